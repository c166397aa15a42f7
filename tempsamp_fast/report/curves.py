"""Curves of several runs over their steps, as data that the page's script draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import numpy as np

from tempsamp_fast.config.reward_terms import parse_rewards, weighted
from tempsamp_fast.report.plots import TRAINING, series, series_names, smooth
from tempsamp_fast.report.runs import RunRecord, by_method, own_rewards
from tempsamp_fast.sample import Mode

MOST_POINTS = 6_000
"""Of one chart, over all of its lines: a page of many runs stays small."""

Line = tuple[RunRecord, Sequence[float], Sequence[float]]


def charts(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """`title` and `lines`, of which each is `method` (an index of `by_method`), `run`, `x` (steps) and `y`.

    Those without a point are left out.
    """
    named = {"mean sampled task reward (running mean)": _rewards(runs)}
    percent = lambda values: 100 * values
    named |= {f"held-out mIoU, {mode} mode [%]": _of(runs, f"eval/{mode}/miou", percent) for mode in get_args(Mode)}
    named |= {f"{label} (running mean)": _of(runs, name, smooth) for name, label in TRAINING.items()}
    found = [{"title": title, "lines": _lines(list(lines), runs)} for title, lines in named.items()]
    return [chart for chart in found if chart["lines"]]


def _rewards(runs: Sequence[RunRecord]) -> Iterator[Line]:
    """The sum that the run's updates were made of, without the format's."""
    for run in runs:
        if not series_names(run.metrics, "reward/on_policy_mean"):
            continue
        first = next(n for n in series_names(run.metrics, "reward/") if not n.endswith(("_mean", "/format")))
        names = [f"reward/{term.name}" for term in parse_rewards(own_rewards(run))] or [first]
        rows = [row for row in run.metrics if all(name in row for name in names)]
        sums = [weighted({name.partition("/")[2]: row[name] for name in names}, own_rewards(run)) for row in rows]
        yield run, [row["step"] for row in rows], smooth(np.array(sums)).tolist()


def _of(runs: Sequence[RunRecord], name: str, shown_as: Callable[[np.ndarray], np.ndarray]) -> Iterator[Line]:
    for run in runs:
        steps, values = series(run.metrics, name)
        yield run, steps.tolist(), shown_as(values).tolist()


def _lines(lines: Sequence[Line], runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    methods = list(by_method(runs))
    lines = [line for line in lines if len(line[1])]
    most = max(2, MOST_POINTS // max(1, len(lines)))
    drawn = []
    for run, steps, values in lines:
        kept = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
        points = [(int(steps[index]), float(f"{values[index]:.4g}")) for index in kept]
        x, y = zip(*((step, value) for step, value in points if np.isfinite(value)), strict=True)
        drawn.append({"method": methods.index(run.method), "run": run.folder.name, "x": x, "y": y})
    return drawn

"""The report's figures, each as SVG text: rewards and advantages by method."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.config.reward_terms import weighted
from tempsamp_fast.learning.advantage import advantages_by_rule, skewness
from tempsamp_fast.report.plots import COLOURS, GRID
from tempsamp_fast.report.runs import RunRecord, by_method, own_rewards

NUM_PARTS = 20
"""Stretches of training that a curve of group statistics has a point for."""


def best_reward(runs: Sequence[RunRecord]) -> str | None:
    """Best sampled task reward of a group over training, by method: median, and quartiles shaded (paper figure 3)."""
    methods = by_method([run for run in runs if run.groups])
    if not methods:
        return None
    figure, axes = _figure(1, 1)
    for method, members in methods.items():
        points = [
            (group["step"], max(task_rewards(group, own_rewards(run)))) for run in members for group in run.groups
        ]
        parts = np.array_split(np.array(sorted(points)), min(NUM_PARTS, len(points)))
        steps = [part[:, 0].mean() for part in parts]
        low, median, high = np.array([np.percentile(part[:, 1], (25, 50, 75)) for part in parts]).T
        colour = method_colours(runs)[method]
        axes[0].fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axes[0].plot(steps, median, color=colour, marker="o" if len(set(steps)) == 1 else None)
    axes[0].set(xlabel="step", ylabel="best sampled reward of a group")
    handles = [Line2D([], [], color=colour, label=method) for method, colour in method_colours(runs).items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return _svg(figure)


def reward_distribution(runs: Sequence[RunRecord]) -> str | None:
    """Sampled task rewards in the first and the last quarter of the groups, a panel per method."""

    def draw(axes: Axes, members: Sequence[RunRecord], colour: str) -> None:
        quarters = [(run, np.array_split(np.array(run.groups, dtype=object), 4)) for run in members]
        for label, quarter, style in (("first quarter", 0, ":"), ("last quarter", 3, "-")):
            rewards = [
                reward
                for run, parts in quarters
                for group in parts[quarter]
                for reward in task_rewards(group, own_rewards(run))
            ]
            if rewards:
                limits = min(0.0, *rewards), max(1.0, *rewards)
                _histogram(axes, rewards, limits, colour, style, f"{label}: mean {np.mean(rewards):.2f}")

    return _panels(runs, draw, "sampled task reward")


def advantage_distribution(runs: Sequence[RunRecord]) -> str | None:
    """Advantages of sampled answers and of those made from the ground truth, a panel per method (paper figure 4)."""
    every = [value for run in runs for group in run.groups for value in group["advantages"]]
    limits = (min(every), max(every)) if every else (0.0, 0.0)

    def draw(axes: Axes, members: Sequence[RunRecord], colour: str) -> None:
        groups = [group for run in members for group in run.groups]
        for label, is_off_policy, style in (("sampled", False, "-"), ("ground truth", True, ":")):
            values = [value for group in groups for value in select(group, group["advantages"], is_off_policy)]
            if values:
                _histogram(axes, values, limits, colour, style, f"{label}: skewness {skewness(values):.2f}")

    return _panels(runs, draw, "advantage")


def rule_comparison(runs: Sequence[RunRecord]) -> str | None:
    """What every rule would have made of one run's rewards, a panel per rule (paper figure 4).

    The run is the first one whose groups hold answers made from the ground truth; None without such a run.
    """
    run = next((run for run in runs if any(any(group["is_off_policy"]) for group in run.groups)), None)
    if run is None:
        return None
    groups = [RolloutGroup(None, _completions(group)) for group in run.groups]  # type: ignore[arg-type]
    is_off_policy = torch.cat([group.is_off_policy() for group in groups])
    by_rule = advantages_by_rule(groups, AlgorithmConfig(**run.config["algorithm"]))
    limits = (min(float(values.min()) for values in by_rule.values()), max(float(v.max()) for v in by_rule.values()))
    figure, panels = _figure(2, 3)
    for axes, (rule, values), colour in zip(panels, by_rule.items(), cycle(COLOURS), strict=False):
        off_policy = is_off_policy if rule != "grpo" else torch.zeros(len(values), dtype=torch.bool)
        for label, chosen, style in (("sampled", ~off_policy, "-"), ("ground truth", off_policy, ":")):
            if chosen.any():
                _histogram(axes, values[chosen].tolist(), limits, colour, style, label)
        axes.set_title(f"{rule}: skewness {skewness(values):.2f}", fontsize=9)
        axes.set_xlabel("advantage")
    panels[0].set_ylabel("share of answers")
    panels[1].legend(frameon=False, fontsize=7)
    return _svg(figure)


def _completions(group: dict[str, Any]) -> list[Completion]:
    """The answers of a recorded group, without their text."""
    nothing = torch.empty(0, dtype=torch.int64)
    return [
        Completion(nothing, "", off, rewards={name: values[index] for name, values in group["rewards"].items()})
        for index, off in enumerate(group["is_off_policy"])
    ]


def task_rewards(group: dict[str, Any], rewards: str | None = None) -> list[float]:
    """Sums of the rewards of a group's sampled answers by the setting `rewards`, without that for the format."""
    named = {name: values for name, values in group["rewards"].items() if name != "format"}
    count = len(group["is_off_policy"])
    sums = [weighted({name: values[index] for name, values in named.items()}, rewards) for index in range(count)]
    return select(group, sums, is_off_policy=False)


def select(group: dict[str, Any], values: Sequence[float], is_off_policy: bool) -> list[float]:
    """The values, one per answer of the group, of its sampled answers or of the other ones."""
    return [value for value, off in zip(values, group["is_off_policy"], strict=True) if off == is_off_policy]


def method_colours(runs: Sequence[RunRecord]) -> dict[str, str]:
    """A colour for each method, the same all over the page."""
    return dict(zip(by_method(runs), cycle(COLOURS), strict=False))


def _figure(num_rows: int, num_columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, 0.6 + 2.6 * num_rows), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, list(figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flat)


def _panels(
    runs: Sequence[RunRecord], draw: Callable[[Axes, Sequence[RunRecord], str], None], label: str
) -> str | None:
    """A panel for each method that has groups, drawn by `draw(axes, its runs, its colour)`; None where none has."""
    methods = by_method([run for run in runs if run.groups])
    if not methods:
        return None
    colours = method_colours(runs)
    num_columns = min(3, len(methods))
    figure, panels = _figure(-(-len(methods) // num_columns), num_columns)
    for axes, (method, members) in zip(panels, methods.items(), strict=False):
        draw(axes, members, colours[method])
        axes.set_title(method, fontsize=9)
        axes.set_xlabel(label)
        axes.legend(frameon=False, fontsize=7, loc="upper center")
    panels[0].set_ylabel("share of answers")
    panels[0].set_ylim(top=1.3 * panels[0].get_ylim()[1])
    for axes in panels[len(methods) :]:
        axes.remove()
    return _svg(figure)


def _histogram(
    axes: Axes, values: Sequence[float], limits: tuple[float, float], colour: str, style: str, label: str
) -> None:
    shares = np.full(len(values), 1 / len(values))
    axes.hist(
        values, bins=24, range=limits, weights=shares, histtype="step", color=colour, ls=style, lw=1.5, label=label
    )


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.6)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()

"""The figures beside the results file, each drawn from it alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.paper import plan
from bench.paper.results import Results
from bench.paper.summary import Record, final, of_group_size, records
from tempsamp_fast.report.plots import COLOURS, finish_axes
from tempsamp_fast.report.runs import interval

COLOUR_OF = dict(zip(plan.METHODS, cycle(COLOURS), strict=False))
LINE_OF = {"nonlinear": "TempSamp-R1", "grpo": "GRPO", "sft": "SFT"}


def draw(results: Results, file: Path) -> list[Path]:
    """Every figure that there are runs for, beside the results' `file` and named after it; returns the files."""
    path = lambda name: file.with_name(f"{file.stem}_{name}.svg")
    core = {method: list(records(results, "core", method).values()) for method in plan.METHODS}
    core = {method: found for method, found in core.items() if found}
    if not core:
        return []
    with _figure(path("methods"), 1, 2) as panels:
        _scores(panels[0], core, "miou", results["constant_span"]["miou"])
        _learning(panels[1], core)
    with _figure(path("distributions"), 2, 3) as panels:
        sampled = {method: found for method, found in core.items() if method != "sft"}
        for axes, (method, found) in zip(panels, sampled.items(), strict=False):
            _advantages(axes, method, found)
        panels[0].legend(frameon=False, fontsize=7)
    with _figure(path("exploratory"), 1, 3) as panels:
        _best_reward(panels[0], core)
        _by_group_size(panels[1], results)
        _by_videos(panels[2], results)
    return [path(name) for name in ("methods", "distributions", "exploratory")]


@contextmanager
def _figure(path: Path, num_rows: int, num_columns: int) -> Iterator[list[Axes]]:
    figure = Figure(figsize=(3.4 * num_columns + 1, 2.9 * num_rows), layout="constrained")
    FigureCanvasSVG(figure)
    yield list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    figure.savefig(path, metadata={"Date": None})


def _scores(axes: Axes, core: dict[str, list[Record]], metric: str, constant: float) -> None:
    """A dot per seed, and mean with 95 % interval beside them."""
    for place, (method, found) in enumerate(core.items()):
        values = [final(record, metric) for record in found]
        axes.plot([place] * len(values), values, "o", color=COLOUR_OF[method], alpha=0.35, markersize=4)
        if len(values) > 1:
            mean = interval(values)
            axes.errorbar(place + 0.25, mean.mean, mean.half_width, fmt="D", color=COLOUR_OF[method], markersize=4)
    axes.axhline(constant, color="#999999", linewidth=0.8, linestyle=":")
    axes.text(len(core) - 0.6, constant, "constant span", ha="right", va="bottom", fontsize=7, color="#666666")
    axes.set_xticks(range(len(core)), list(core), rotation=35, fontsize=8)
    axes.set_ylabel("held-out mIoU at the end")
    finish_axes(axes)


def _learning(axes: Axes, core: dict[str, list[Record]]) -> None:
    for method, found in core.items():
        curves = [record["evaluations"]["answer"] for record in found]
        mean = np.mean([[point["miou"] for point in curve] for curve in curves], axis=0)
        axes.plot(
            [point["step"] for point in curves[0]], mean, "o-", color=COLOUR_OF[method], markersize=3, label=method
        )
    axes.set(xlabel="step", ylabel="held-out mIoU, mean over seeds")
    finish_axes(axes)


def _advantages(axes: Axes, method: str, found: Sequence[Record]) -> None:
    """Shares of all answers by their advantage, sampled ones and true ones."""
    counts = {
        source: np.sum([record["advantages"]["histogram"][source] for record in found], axis=0)
        for source in found[0]["advantages"]["histogram"]
    }
    total = sum(values.sum() for values in counts.values())
    edges = np.linspace(*found[0]["advantages"]["limits"], len(next(iter(counts.values()))) + 1)
    for (source, values), style in zip(counts.items(), ("-", ":"), strict=False):
        axes.stairs(values / total, edges, color=COLOUR_OF[method], linestyle=style, label=source.replace("_", "-"))
    skewness = np.mean([record["advantages"]["skewness"] for record in found])
    axes.set_title(f"{method}, skewness {skewness:.2f}", fontsize=9)
    axes.set(xlabel="advantage", ylabel="share of answers", yscale="log")


def _best_reward(axes: Axes, core: dict[str, list[Record]]) -> None:
    """Median over the groups of a part of training, quartiles shaded, both averaged over seeds."""
    for method, found in core.items():
        if method not in ("grpo", "nonlinear", "mixed"):
            continue
        low, median, high = (
            np.mean([record["rewards"]["best_of_group"][name] for record in found], axis=0)
            for name in ("low", "median", "high")
        )
        progress = (np.arange(len(median)) + 0.5) / len(median)
        axes.fill_between(progress, low, high, color=COLOUR_OF[method], alpha=0.12, linewidth=0)
        axes.plot(progress, median, color=COLOUR_OF[method], label=method)
    axes.set(xlabel="share of training", ylabel="best sampled reward of a group")
    axes.legend(frameon=False, fontsize=7)


def _by_group_size(axes: Axes, results: Results) -> None:
    for method in ("grpo", "nonlinear"):
        found = {size: of_group_size(results, method, size) for size in plan.GROUP_SIZES}
        _line(axes, method, {size: list(seeds.values()) for size, seeds in found.items()})
    axes.set_xticks(plan.GROUP_SIZES)
    axes.set(xlabel="answers per prompt", ylabel="held-out mIoU at the end")


def _by_videos(axes: Axes, results: Results) -> None:
    for method in ("sft", "grpo", "nonlinear"):
        found = {n: records(results, "few shot", method, num_videos=n) for n in plan.FEW_SHOT_VIDEOS}
        _line(axes, method, {number: list(seeds.values()) for number, seeds in found.items()})
    axes.set_xscale("log")
    axes.set_xticks(plan.FEW_SHOT_VIDEOS, [str(number) for number in plan.FEW_SHOT_VIDEOS])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="training videos", ylabel="held-out mIoU at the end")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)


def _line(axes: Axes, method: str, found: dict[int, list[Record]]) -> None:
    """Mean over seeds at each place, and faintly every seed."""
    found = {place: seeds for place, seeds in found.items() if seeds}
    scores = {place: [final(record, "miou") for record in seeds] for place, seeds in found.items()}
    for place, values in scores.items():
        axes.plot([place] * len(values), values, "o", color=COLOUR_OF[method], alpha=0.35, markersize=3)
    if scores:
        means = [float(np.mean(values)) for values in scores.values()]
        axes.plot(list(scores), means, "D-", color=COLOUR_OF[method], markersize=4, label=LINE_OF[method])

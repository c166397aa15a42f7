"""Pictures of a run, each drawn from its record: RUN/metrics.jsonl and RUN/eval/<stage>_<mode>.jsonl."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, groupby
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

import numpy as np
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from tempsamp_fast.data.text_files import json_rows
from tempsamp_fast.sample import Mode, Span
from tempsamp_fast.system.files import own_folder, write_file

Row = Mapping[str, Any]
rcParams["text.parse_math"] = False
"""Queries and settings are drawn as they are: between dollars they would be read as formulas."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b")
"""Okabe and Ito's, told apart by colour-blind readers too."""
GRID = "#d5d9de"
TRAINING = {
    "loss": "loss",
    "policy/kl": "KL to the reference [nat]",
    "policy/entropy": "entropy [nat]",
    "optim/grad_norm": "gradient norm",
    "optim/learning_rate": "learning rate",
    "completion/mean_length": "answer length [tokens]",
}
"""What tells how training goes, by metric."""
PHASE_SHADES = ("#f1f3f6", "#e3e8ee")
EVAL_PHASE = "eval"
STAGE = r"start|\d{1,9}"
"""What a file of answers begins with: the phase after which they were given, from 1."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none for a file that is missing."""
    return [row for _, _, row in json_rows(path)] if path.is_file() else []


def eval_files(run: Path, mode: str) -> list[Path]:
    """The answers of a run in one mode, from the cold start to the last phase."""
    stages = {file: file.stem.partition("_")[0] for file in (run / "eval").glob(f"*_{mode}.jsonl")}
    numbers = {file: int(stage.replace("start", "0")) for file, stage in stages.items() if re.fullmatch(STAGE, stage)}
    return sorted(numbers, key=numbers.__getitem__)


def plot_run(run: Path) -> list[Path]:
    """Draw every picture that the record of `run` has the figures for, into RUN/plots; returns the files."""
    rows = read_rows(run / "metrics.jsonl")
    folder = own_folder(run / "plots")
    drawn = []
    if series_names(rows, "reward/"):
        drawn += [plot_reward(rows, folder / "reward.png")]
    if series_names(rows, "reward/off_policy_mean"):
        drawn += [plot_on_and_off_policy(rows, folder / "on_and_off_policy_reward.png")]
    if any(series_names(rows, name) for name in TRAINING):
        drawn += [plot_training(rows, folder / "training.png")]
    if series_names(rows, "advantage/skew/"):
        drawn += [plot_skewness(rows, folder / "advantage_skewness.png")]
    for mode in get_args(Mode):
        files = eval_files(run, mode)
        if len(files) > 1:
            answers = {file.stem.removesuffix(f"_{mode}"): read_rows(file) for file in files}
            drawn += [plot_iou_distribution(answers, folder / f"iou_{mode}.png", mode)]
    return drawn


def plot_reward(rows: Sequence[Row], path: Path) -> Path:
    """Mean on-policy rewards over the steps, and below them the mIoU of every evaluation; phases shaded."""
    with _figure(path, height=5.4) as figure:
        top, bottom = figure.subplots(2, sharex=True)
        means = ("reward/on_policy_mean", "reward/off_policy_mean")
        rewards = [name for name in series_names(rows, "reward/") if name not in means]
        for name, colour in zip(rewards, cycle(COLOURS), strict=False):
            draw_series(top, rows, name, name.removeprefix("reward/"), colour)
        mious = [name for name in series_names(rows, "eval/") if name.endswith("/miou")]
        for name, colour in zip(mious, cycle(COLOURS), strict=False):
            bottom.plot(*series(rows, name), "o-", color=colour, label=name.split("/")[1])
        for axes, label in ((top, "on-policy reward"), (bottom, "held-out mIoU")):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            finish_axes(axes, rows)
        bottom.set_xlabel("step")
        label_phases(top, rows)
    return path


def plot_training(rows: Sequence[Row], path: Path) -> Path:
    """A panel for each metric of `TRAINING` that the run has; the shortest and longest answers beside their mean."""
    names = [name for name in TRAINING if series_names(rows, name)]
    with _figure(path, height=1.9 * -(-len(names) // 2) + 0.4) as figure:
        panels = figure.subplots(-(-len(names) // 2), 2, sharex=True, squeeze=False).flat
        for name, axes, colour in zip(names, panels, COLOURS, strict=False):
            if name == "completion/mean_length":
                for extreme in ("completion/min_length", "completion/max_length"):
                    axes.plot(*series(rows, extreme), color=colour, alpha=0.4, linewidth=0.7)
            draw_series(axes, rows, name, "", colour)
            axes.set_title(TRAINING[name], fontsize=9)
            finish_axes(axes, rows)
        for axes in figure.axes[len(names) :]:
            axes.remove()
        for axes in figure.axes[-2:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
    return path


def plot_on_and_off_policy(rows: Sequence[Row], path: Path) -> Path:
    """Mean total reward of the sampled answers against that of the answer made from the ground truth."""
    rows = [row for row in rows if "reward/off_policy_mean" in row]
    labels = {f"reward/{source}_policy_mean": f"{source}-policy" for source in ("on", "off")}
    return _plot_series(rows, labels, "mean reward", path)


def plot_skewness(rows: Sequence[Row], path: Path) -> Path:
    """Skewness of the advantages each rule gives the same rewards (paper figure 4)."""
    names = series_names(rows, "advantage/skew/")
    rows = [row for row in rows if names[0] in row]
    labels = {name: name.rsplit("/", 1)[1] for name in names}
    return _plot_series(rows, labels, "skewness of the advantages", path, has_zero_line=True)


def _plot_series(
    rows: Sequence[Row], labels: Mapping[str, str], ylabel: str, path: Path, has_zero_line: bool = False
) -> Path:
    with _figure(path) as figure:
        axes = figure.subplots()
        if has_zero_line:
            axes.axhline(0, color="#999999", linewidth=0.8)
        for (name, label), colour in zip(labels.items(), cycle(COLOURS), strict=False):
            draw_series(axes, rows, name, label, colour)
        axes.set(xlabel="step", ylabel=ylabel)
        finish_axes(axes, rows)
        label_phases(axes, rows)
    return path


def plot_iou_distribution(answers: Mapping[str, Sequence[Row]], path: Path, mode: str) -> Path:
    """IoUs of several evaluations by label: their histogram, and the share of queries that reach each IoU."""
    with _figure(path) as figure:
        left, right = figure.subplots(1, 2)
        thresholds = np.linspace(0, 1, 101)
        for (label, rows), colour in zip(answers.items(), cycle(COLOURS), strict=False):
            ious = np.array([row["iou"] for row in rows])
            shares = np.full(len(ious), 1 / len(ious))
            left.hist(ious, list(thresholds[::5]), weights=shares, color=colour, histtype="step", linewidth=1.5)
            reached = (ious[:, None] >= thresholds).mean(axis=0)
            right.plot(thresholds[1:], reached[1:], color=colour, label=f"{label}\nmean {ious.mean():.3f}")
        left.set(xlabel=f"IoU ({mode} mode)", ylabel="share of held-out queries", xlim=(0, 1))
        right.set(xlabel="IoU of at least", xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.3, 0.5, 0.7, 1))
        right.grid(axis="x", color=GRID, linewidth=0.6)
        finish_axes(left)
        finish_axes(right)
    return path


def plot_timeline(
    frames: ArrayLike,
    times_s: Sequence[float],
    duration_s: float,
    spans: Mapping[str, Span | None],
    query: str,
    path: Path,
) -> Path:
    """A bar over the video's seconds for every labelled span, or the words that there is none, and frames under it.

    Of a span that goes on beyond the video, the part inside is drawn.

    `frames` is [num_frames, 3, height, width] uint8, best taken at equal distances; `times_s` their times.
    """
    pictures = np.asarray(frames).transpose(0, 2, 3, 1)
    num_frames, height, width = pictures.shape[:3]
    strip = 8.6 * height / (width * num_frames)
    bars = 0.3 * len(spans) + 0.1
    with _figure(path, height=bars + strip + 1.0) as figure:
        top, bottom = figure.subplots(2, height_ratios=(bars, strip), gridspec_kw={"hspace": 0.0})
        for position, (span, colour) in enumerate(zip(spans.values(), cycle(COLOURS), strict=False)):
            start, end = drawn_part(span or (0.0, 0.0), duration_s)
            top.barh(position, end - start, left=start, height=0.55, color=colour)
            # Beside the bar where there is room, so that it is never over the row's name.
            place, side = (end, "left") if end < 0.7 * duration_s else (start, "right")
            if side == "right" and start < 0.3 * duration_s:
                place, side = (start + end) / 2, "center"
            top.text(place, position, f" {times_text(span)} ", va="center", ha=side, fontsize=8)
        top.set_title(shorten(f"“{query}”", width=110, placeholder=" …"), fontsize=11)
        top.set(xlim=(0, duration_s), ylim=(len(spans) - 0.4, -0.6), yticks=range(len(spans)), yticklabels=list(spans))
        top.tick_params(axis="y", length=0)
        top.spines[["top", "right", "left"]].set_visible(False)
        slot = duration_s / num_frames
        for index, (picture, time) in enumerate(zip(pictures, times_s, strict=True)):
            bottom.imshow(picture, extent=(index * slot, (index + 1) * slot, 0, 1), aspect="auto")
            bottom.text((index + 0.5) * slot, -0.05, f"{time:.1f} s", ha="center", va="top", fontsize=8)
        bottom.set(xlim=(0, duration_s), ylim=(0, 1))
        bottom.axis("off")
    return path


def drawn_part(span: Sequence[float], duration_s: float) -> Span:
    """The part of a span that lies inside the video; empty where none does, or where the end is before the start."""
    start, end = (min(max(time, 0.0), duration_s) for time in span)
    return start, max(start, end)


def times_text(span: Sequence[float] | None) -> str:
    """`1.00 to 2.50 s`, short for a time of any size."""
    if span is None:
        return "no answer"
    return " to ".join(f"{time:.2f}" if time < 1e6 else f"{time:.2g}" for time in span) + " s"


def series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have the metric `name`."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def series_names(rows: Sequence[Row], prefix: str) -> list[str]:
    """Metrics that start with `prefix`, in the order in which they first occur."""
    return list(dict.fromkeys(name for row in rows for name in row if name.startswith(prefix)))


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a twentieth of the points on either side."""
    reach = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def draw_series(axes: Axes, rows: Sequence[Row], name: str, label: str, colour: str) -> None:
    """A metric over the steps: its running mean within each phase, and faintly every value."""
    for _, first, last in phase_ranges(rows):
        steps, values = series([row for row in rows if first <= row["step"] < last], name)
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, smooth(values), color=colour, linewidth=1.6, marker=marker, markersize=3)
    axes.plot([], [], color=colour, label=label)


def phase_ranges(rows: Sequence[Row]) -> list[tuple[str, int, int]]:
    """(phase, first step, step after its last one) for every phase of training."""
    ranges = []
    trained = (row for row in rows if row["phase"] != EVAL_PHASE)
    for phase, group in groupby(trained, key=lambda row: row["phase"]):
        steps = [row["step"] for row in group]
        ranges.append((phase, steps[0], steps[-1] + 1))
    return ranges


def label_phases(axes: Axes, rows: Sequence[Row]) -> None:
    """Write the names of the phases above `axes`."""
    for phase, first, last in phase_ranges(rows):
        place = ((first + last) / 2, 1.02)
        axes.text(*place, phase, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color="#555555")


def finish_axes(axes: Axes, rows: Sequence[Row] = ()) -> None:
    """Shade the phases of `rows`, add the grid and, where there are labels, the legend."""
    ranges = phase_ranges(rows)
    for index, (_, first, last) in enumerate(ranges):
        axes.axvspan(first, last, color=PHASE_SHADES[index % 2], linewidth=0, zorder=0)
    if ranges:
        axes.set_xlim(ranges[0][1], ranges[-1][2])
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=(1, 2, 2.5, 5, 10), integer=True))  # steps are whole
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


@contextmanager
def _figure(path: Path, height: float = 3.4) -> Iterator[Figure]:
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=130, format=path.suffix[1:] or "png")
    write_file(path, drawn.getvalue())

"""Plots: what they read off a record, and that the pictures show it."""

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tempsamp_fast.report.plots import (
    COLOURS,
    drawn_part,
    eval_files,
    phase_ranges,
    plot_run,
    plot_timeline,
    plot_training,
    read_rows,
    series,
    smooth,
    times_text,
)


def training_rows(phase, first, number, **metrics):
    return [{"step": first + index, "phase": phase, "loss": 1.0, **metrics} for index in range(number)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path):
    """A record of two phases with evaluations before, between and after them."""
    rows = [{"step": 0, "phase": "eval", "eval/answer/miou": 0.1}, *training_rows("sft/answer", 0, 4)]
    rows += [{"step": 4, "phase": "eval", "eval/answer/miou": 0.2}]
    rewards = {"reward/tiou": 0.3, "reward/on_policy_mean": 0.3, "reward/off_policy_mean": 1.0}
    rows += training_rows("tempsamp/answer", 4, 3, **rewards, **{"advantage/skew/mixed": 0.5})
    rows += [{"step": 7, "phase": "eval", "eval/answer/miou": 0.4}]
    write_rows(tmp_path / "metrics.jsonl", rows)
    for stage in ("start", "1_sft_answer", "2_tempsamp_answer"):
        write_rows(tmp_path / f"eval/{stage}_answer.jsonl", [{"iou": 0.0}, {"iou": 0.5}])
    return tmp_path


def test_every_plot_the_record_has_figures_for_is_drawn(run):
    names = [path.name for path in plot_run(run)]
    assert names == ["reward.png", "on_and_off_policy_reward.png", "training.png", "advantage_skewness.png",
                     "iou_answer.png"]  # fmt: skip
    assert all(imread(run / "plots" / name).shape[1] == 1170 for name in names)


def test_a_record_without_rewards_and_evaluations_draws_the_loss_alone(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", training_rows("sft/answer", 0, 2))
    assert [path.name for path in plot_run(tmp_path)] == ["training.png"]


def test_training_is_drawn_a_panel_for_each_figure_that_there_is(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    lengths = {f"completion/{name}_length": 5.0 for name in ("min", "mean", "max")}
    rows = training_rows("grpo/answer", 0, 3, **{"optim/grad_norm": 0.5, "policy/entropy": 1.0}, **lengths)
    plot_training(rows, tmp_path / "a.png")
    assert titles == ["loss", "entropy [nat]", "gradient norm", "answer length [tokens]"]
    assert imread(tmp_path / "a.png").shape[0] > 400


def test_phases_come_from_training_rows_only(run):
    rows = read_rows(run / "metrics.jsonl")
    assert phase_ranges(rows) == [("sft/answer", 0, 4), ("tempsamp/answer", 4, 7)]


def test_series_has_the_rows_with_the_metric(run):
    steps, values = series(read_rows(run / "metrics.jsonl"), "eval/answer/miou")
    assert steps.tolist() == [0, 4, 7] and values.tolist() == [0.1, 0.2, 0.4]


def test_evaluations_are_in_the_order_of_the_phases(tmp_path):
    for stage in ("10_grpo_answer", "start", "2_sft_think", "2_sft_answer"):
        write_rows(tmp_path / f"eval/{stage}_answer.jsonl", [{"iou": 0.0}])
    stages = [file.stem.split("_")[0] for file in eval_files(tmp_path, "answer")]
    assert stages == ["start", "2", "2", "10"] and eval_files(tmp_path, "think") == []


def test_smooth_is_a_running_mean_that_keeps_the_length():
    values = np.random.default_rng(0).normal(size=100)
    assert smooth(values)[50] == pytest.approx(values[45:56].mean())
    assert smooth(values)[0] == pytest.approx(values[:6].mean())
    assert smooth(values[:5]).tolist() == pytest.approx(values[:5].tolist())


def test_timeline_bars_are_as_long_as_their_spans(tmp_path):
    frames = np.full((4, 3, 30, 40), 90, dtype=np.uint8)
    spans = {"true": (5.0, 15.0), "predicted": (2.0, 7.0)}
    picture = imread(plot_timeline(frames, [2.5, 7.5, 12.5, 17.5], 20.0, spans, "a query", tmp_path / "t.png"))
    widths = [
        np.flatnonzero(np.abs(picture[..., :3] - to_rgb(colour)).max(axis=2).min(axis=0) < 0.01).size
        for colour in COLOURS[:2]
    ]
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.02)
    grey = np.abs(picture[..., :3] - 90 / 255).max(axis=2) < 0.01
    assert grey.any(axis=0).sum() == pytest.approx(2 * widths[0], rel=0.02)


def texts_of(tmp_path, monkeypatch, span, duration_s=20.0):
    """What `plot_timeline` writes beside its one bar and where, and the picture's size."""
    written = []
    text = Axes.text

    def noting(axes, x, y, said, **more):
        written.append((x, said, more))
        return text(axes, x, y, said, **more)

    monkeypatch.setattr(Axes, "text", noting)
    frames = np.full((4, 3, 30, 40), 90, dtype=np.uint8)
    path = plot_timeline(frames, [2.5, 7.5, 12.5, 17.5], duration_s, {"predicted": span}, "a query", tmp_path / "t.png")
    return written[0], imread(path)


@pytest.mark.parametrize(
    "span",
    [
        *((14.0, 1111.0), (14.0, 1e95), (25.0, 30.0), (1e95, 1e96), (9.0, 5.0)),
        *((0.0, 20.0), (0.1, 0.3), (19.7, 20.0), (2.0, 18.0), None),
    ],
)
def test_a_span_outside_the_video_or_none_at_all_is_drawn_inside_the_picture(tmp_path, monkeypatch, span):
    """Its label is short, inside the axes on the side that it grows to, and says what was answered."""
    (place, said, more), picture = texts_of(tmp_path, monkeypatch, span)
    assert picture.shape[1] == 1170 and picture.shape[0] < 600
    assert 0 <= place <= 20.0 and len(said) < 30
    room = {"left": 20.0 - place, "right": place, "center": min(place, 20.0 - place)}[more["ha"]]
    assert room >= 0.15 * 20.0
    assert said.strip() == ("no answer" if span is None else times_text(span))


@pytest.mark.parametrize(
    ("span", "part", "said"),
    [
        ((14.0, 1111.0), (14.0, 20.0), "14.00 to 1111.00 s"),
        ((14.0, 1e95), (14.0, 20.0), "14.00 to 1e+95 s"),
        ((25.0, 30.0), (20.0, 20.0), "25.00 to 30.00 s"),
        ((9.0, 5.0), (9.0, 9.0), "9.00 to 5.00 s"),
        ((1.0, 2.5), (1.0, 2.5), "1.00 to 2.50 s"),
    ],
)
def test_the_part_inside_the_video_is_drawn_and_the_whole_is_named(span, part, said):
    assert drawn_part(span, 20.0) == part and times_text(span) == said

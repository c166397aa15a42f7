"""Plots: what they read off a record, and that the pictures show it."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from tempsamp_fast.report.plots import (
    COLOURS,
    eval_files,
    phase_ranges,
    plot_run,
    plot_timeline,
    read_rows,
    series,
    smooth,
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
    assert names == ["reward.png", "on_and_off_policy_reward.png", "advantage_skewness.png", "iou_answer.png"]
    assert all(imread(run / "plots" / name).shape[1] == 1170 for name in names)


def test_a_record_without_rewards_and_evaluations_draws_nothing(tmp_path):
    write_rows(tmp_path / "metrics.jsonl", training_rows("sft/answer", 0, 2))
    assert plot_run(tmp_path) == []


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

"""Runs read back: named by what differs between them, their scores with intervals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.report.figures import select, skewness, task_rewards
from tempsamp_fast.report.gallery import pick_samples
from tempsamp_fast.report.runs import Interval, RunRecord, interval, name_methods, read_runs, score_table


def config(seed=0, shaping="mixed", output_dir="a", task="grounding"):
    train = {"seed": seed, "output_dir": output_dir}
    return {"data": {"task": task}, "algorithm": {"shaping": shaping, "tau": 0.8}, "train": train}


def record(method, seed, ious, mode="answer"):
    answers = [{"sample_id": str(i), "iou": iou, "span": None if iou is None else (0, 1)} for i, iou in enumerate(ious)]
    return RunRecord(None, method, seed, config(seed), [], [], {mode: answers})


def named(*names):
    configs = [config(0, "mixed", "a"), config(1, "mixed", "b"), config(0, "anchor", "c")]
    return name_methods(configs[: len(names)], [Path("runs", name) for name in names])


def test_methods_are_named_by_what_their_folders_share():
    assert named("grpo-0", "grpo-1", "anchor") == ["grpo-*", "grpo-*", "anchor"]
    assert named("seed0_grpo", "seed1_grpo", "x") == ["seed*_grpo", "seed*_grpo", "x"]
    assert named("a/grpo", "b/grpo", "c/x") == ["grpo", "grpo", "x"]
    assert named("run", "run") == ["run", "run"]


@pytest.mark.parametrize("names", [("a/run", "b/run", "c/run"), ("1", "2", "x")])
def test_methods_whose_folders_do_not_tell_them_apart_are_named_by_their_settings(names):
    assert named(*names) == ["shaping=mixed", "shaping=mixed", "shaping=anchor"]


def test_a_folder_without_a_run_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    with pytest.raises(ValueError, match=r"not a run folder, it has no metrics\.jsonl"):
        read_runs([tmp_path])


def test_interval_is_students():
    """Mean 2, standard deviation 1, three values: 4.303 / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0]).half_width)


def test_interval_covers_the_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    draws = [interval(rng.normal(size=5).tolist()) for _ in range(2000)]
    assert np.mean([abs(draw.mean) <= draw.half_width for draw in draws]) == pytest.approx(0.95, abs=0.015)


def test_gain_is_paired_by_seed():
    """The second method gains 0.1 on each seed, though the seeds differ by much more."""
    runs = [record("a", 0, [0.1]), record("a", 1, [0.7]), record("b", 1, [0.8]), record("b", 0, [0.2])]
    first, second = score_table(runs)
    assert first.gain is None and (second.gain.mean, second.gain.half_width) == pytest.approx((0.1, 0.0))
    assert second.scores["miou"].half_width > 1 and second.seeds == (1, 0)


def test_one_seed_has_its_interval_over_the_queries():
    (row,) = score_table([record("a", 0, [1.0, 0.0, None, 0.6])])
    assert row.scores["miou"] == Interval(0.4, pytest.approx(interval([1.0, 0.0, 0.0, 0.6]).half_width))
    assert row.scores["parse_rate"].mean == 0.75 and row.gain is None


def test_one_common_seed_has_its_gain_over_the_queries_that_both_answered():
    ours = record("b", 0, [0.3, None, 0.9, 0.9])
    _, row = score_table([record("a", 0, [0.1, 0.2, 0.9]), ours])
    assert row.gain == Interval(pytest.approx(0.0), pytest.approx(interval([0.2, -0.2, 0.0]).half_width))


def test_modes_are_scored_apart():
    rows = score_table([record("a", 0, [1.0, 1.0]), record("b", 0, [0.5, 0.5], mode="think")])
    assert [(row.method, row.mode) for row in rows] == [("a", "answer"), ("b", "think")]


def highlight_record(method, seed, *hl_maps):
    """A run whose answers have no spans, evaluated before training and after."""
    metrics = [{"step": 0, "phase": "eval", "eval/answer/hl_map": each, "eval/answer/hit@1": 0.5} for each in hl_maps]
    answers = {mode: [{"sample_id": "0", "iou": 0.0, "span": None}] for mode in ("answer", "think")}
    return RunRecord(None, method, seed, config(seed, task="highlight"), metrics, [], answers)


def test_another_task_shows_its_own_scores_of_the_last_evaluation():
    runs = [highlight_record("a", 0, 0.1, 0.3), highlight_record("a", 1, 0.1, 0.5)]
    runs += [highlight_record("b", 0, 0.1, 0.4), highlight_record("b", 1, 0.1, 0.6)]
    first, second = score_table(runs)
    assert {name: each.mean for name, each in first.scores.items()} == {"hl_map": pytest.approx(0.4), "hit@1": 0.5}
    assert (first.mode, second.gain.mean) == ("answer", pytest.approx(0.1))


def test_one_seed_of_another_task_has_no_interval():
    (row,) = score_table([highlight_record("a", 0, 0.3)])
    assert row.scores["hl_map"].percent() == "30.0"


def test_runs_of_different_tasks_are_refused_by_name(tmp_path):
    for task in ("grounding", "highlight"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "config.json").write_text(json.dumps(config(task=task)))
        (tmp_path / task / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match=r"different tasks.*grounding grounding, .*highlight highlight"):
        read_runs([tmp_path / "grounding", tmp_path / "highlight"])


def test_oracle_of_both_modes_needs_both():
    run = record("a", 0, [1.0, 0.0])
    run.answers["think"] = [{"iou": 0.2, "span": (0, 1)}, {"iou": 0.4, "span": (0, 1)}]
    rows = {row.mode: row.scores["miou"].mean for row in score_table([run])}
    assert rows == {"answer": 0.5, "think": pytest.approx(0.3), "oracle of both": 0.7}


def test_gallery_spans_the_first_runs_worst_to_best():
    runs = [record("a", 0, [0.5, 0.1, 0.9, 0.3, 0.7]), record("b", 0, [0.1, 0.1, 0.1, 0.1])]
    assert pick_samples(runs, "answer", 2) == ["1", "2"]
    assert pick_samples(runs, "answer", 10) == ["1", "3", "0", "2"]


def test_task_rewards_are_those_of_sampled_answers_without_the_format():
    group = {"rewards": {"tiou": [0.2, 0.4, 1.0], "format": [1, 0, 1]}, "is_off_policy": [False, False, True]}
    assert task_rewards(group) == [0.2, 0.4]
    assert select(group, [5.0, 6.0, 7.0], is_off_policy=True) == [7.0]


def test_skewness():
    assert skewness([1.0, 1.0]) == 0 and skewness([-1.0, 0.0, 1.0]) == 0
    assert skewness([0.0, 0.0, 0.0, 1.0]) == pytest.approx(1.1547, abs=1e-4)

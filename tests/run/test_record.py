"""What a finished run leaves behind, and asking its model a question."""

from __future__ import annotations

import fcntl
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.evaluation.asking import answer_row
from tempsamp_fast.evaluation.scoring import read_predictions
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.learning.groups import RecordedRollouts
from tempsamp_fast.rewards import parse_span
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.results import table
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.sample import Sample

PNG = b"\x89PNG"


def test_metrics_have_a_row_for_every_step_and_evaluation(finished_run) -> None:
    assert [(row["step"], row["phase"]) for row in finished_run.rows] == [
        (0, "eval"),
        (0, "sft/answer"),
        (1, "sft/answer"),
        (2, "eval"),
        (2, "tempsamp/answer"),
        (3, "tempsamp/answer"),
        (4, "tempsamp/answer"),
        (5, "eval"),
    ]


def test_rows_have_the_figures_of_their_kind(finished_run) -> None:
    for row in finished_run.rows:
        if row["phase"] == "eval":
            assert {"eval/answer/miou", "eval/answer/r1@0.5", "eval/answer/parse_rate"} <= row.keys()
            continue
        assert row["optim/grad_norm"] > 0
        assert {"loss", "policy/entropy", "optim/learning_rate", "time/data_s", "time/step_s"} <= row.keys()
        if row["phase"] == "tempsamp/answer":
            assert {"reward/tiou", "reward/on_policy_mean", "reward/off_policy_mean", "policy/kl"} <= row.keys()
            rules = {name.rpartition("/")[2] for name in row if name.startswith("advantage/skew/")}
            assert rules == {"grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl"}
            assert row["reward/off_policy_mean"] == pytest.approx(1)


def test_tensorboard_shows_what_the_record_has(finished_run) -> None:
    events = EventAccumulator(str(finished_run.folder / "tensorboard"))
    events.Reload()
    shown = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert [(row["step"], row["loss"]) for row in finished_run.rows if "loss" in row] == shown


def test_the_folder_tells_settings_versions_and_hardware(finished_run) -> None:
    config = json.loads((finished_run.folder / "config.json").read_text())
    assert config["train"]["phases"] == "sft:2,tempsamp:3"
    assert config["data"]["fps"] == 1.0
    machine = json.loads((finished_run.folder / "machine.json").read_text())
    assert machine["versions"]["torch"] and machine["devices"]


def test_plots_are_drawn_at_the_end(finished_run) -> None:
    plots = {path.name: path for path in (finished_run.folder / "plots").iterdir()}
    assert {"reward.png", "on_and_off_policy_reward.png", "advantage_skewness.png", "iou_answer.png"} <= plots.keys()
    assert all(path.read_bytes().startswith(PNG) for path in plots.values())


def test_the_table_has_every_stage_and_the_constant_baseline(finished_run) -> None:
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    lines = table(summary["rows"], summary["num_queries"]).splitlines()
    assert lines[0] == "4 held-out queries, protocol own: frames, prompt and parser of this run"
    assert lines[1].split() == ["after", "mode", "miou", "r1@0.3", "r1@0.5", "r1@0.7", "parse_rate"]
    assert [line.split()[0] for line in lines[2:]] == ["start", "1_sft/answer", "2_tempsamp/answer", "constant"]


def test_without_required_tags_evaluation_reads_what_rewards_read() -> None:
    sample = Sample("s", Path("v.mp4"), "query", 10.0, ((2.0, 4.0),))
    assert [answer_row(sample, "2 to 4", require_tags=tags)["iou"] for tags in (True, False)] == [0, 1]


def test_another_task_is_evaluated_by_its_own_metrics(
    trainer, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--phases", "sft:1", "--task", "multi_grounding", "--max_eval_samples", "2")
    rows = trainer.main(tmp_path / "run", *words, "--eval_annotations", str(clips / "annotations/test.json"))
    assert {"eval/answer/miou", "eval/answer/mr_map"} <= rows[-1].keys()
    header, *evaluations = capsys.readouterr().out.splitlines()[-4:]
    assert "mr_map@0.75" in header and evaluations[-1].startswith("constant")


def test_evaluation_answers_are_predictions_that_can_be_scored(finished_run, clips: Path) -> None:
    files = sorted(path.name for path in (finished_run.folder / "eval").iterdir())
    assert files == ["1_sft_answer_answer.jsonl", "2_tempsamp_answer_answer.jsonl", "start_answer.jsonl"]
    samples = load_annotations(clips / "annotations/test.json", clips / "videos")[:4]
    rows = read_predictions(finished_run.folder / "eval/start_answer.jsonl", samples)
    assert [row["sample_id"] for row in rows] == [sample.sample_id for sample in samples]


@pytest.mark.parametrize("think", [False, True])
def test_a_trained_model_answers_a_query_in_json(
    finished_run, clips: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, think: bool
) -> None:
    model = latest_checkpoint(finished_run.folder)[0] / "model"
    video = next((clips / "videos").glob("*.mp4"))
    words = ["--model", str(model), "--video", str(video), "--query", "a red square", "--max_completion_length", "8"]
    words += ["--video_backend", "torchcodec"] if think else []
    capsys.readouterr()
    assert infer_main([*words, "--plot", str(tmp_path / "timeline.png"), *(["--think"] if think else [])]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["video"] == str(video) and answer["query"] == "a red square"
    span = parse_span(answer["text"])
    assert answer["span"] == (None if span is None else list(span))
    assert 8 <= answer["duration_s"] <= 12
    assert (tmp_path / "timeline.png").read_bytes().startswith(PNG)


def test_ranks_that_record_to_one_file_wait_for_each_other(stepper, tmp_path: Path) -> None:
    run = stepper("--phases", "grpo:1").run
    record = RecordedRollouts(tmp_path / "answers.jsonl", run.chat)
    (prompt,) = run.prompts(next(plan(run.phases)))[:1]
    with record.path.open("a") as other, ThreadPoolExecutor() as thread:
        fcntl.flock(other, fcntl.LOCK_EX)
        writing = thread.submit(record.write, 0, [prompt], [[run.chat.completion(torch.tensor([1, 2]))]])
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.3)
        assert record.path.read_text() == ""
        fcntl.flock(other, fcntl.LOCK_UN)
        writing.result(timeout=30)
    assert record.read(0, [prompt], [1])[0][0].ids.tolist() == [1, 2]

"""Bad input through the front door: exit code 2 and one line that names the thing."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2Config

from tempsamp_fast.config import DataConfig
from tempsamp_fast.evaluation.asking import evaluate
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.run.checkpoint import checkpoints, latest_checkpoint
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan

GOOD = {"duration": 8.0, "timestamps": [[1.0, 3.0]], "sentences": ["a square appears"]}
SHORT = ("--phases", "sft:1")


@pytest.fixture
def annotated(clips: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`annotated(name=entry)`: a file of these videos, as command line words."""

    def write(**entries: Any) -> list[str]:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(entries))
        return ["--annotations", str(path), "--videos", str(clips / "videos")]

    return write


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("timestamps", [[3.0, 1.0]], "[3.0, 1.0] does not end after its start"),
        ("timestamps", [[8.0, 9.0]], "starts at or beyond the duration 8.0"),
        ("timestamps", [[float("nan"), 1.0]], "nan, expected a finite number"),
        ("timestamps", [[0.0, 1.0], [2.0, 3.0]], "1 sentences but 2 timestamps"),
        ("timestamps", [["0", "1"]], "'0', expected a finite number"),
        ("sentences", [" . "], "query ' . ' is empty"),
        ("sentences", [7], "query is 7, expected a str"),
        ("duration", "long", "duration has 'long'"),
        ("duration", -1.0, "duration -1.0 is not positive"),
    ],
)
def test_a_malformed_annotation_is_named_with_its_video(
    trainer, annotated, refused, tmp_path: Path, field: str, value: Any, named: str
) -> None:
    words = trainer.flags(tmp_path / "run", *SHORT, *annotated(badvideo=GOOD | {field: value}))
    line = refused(words)
    assert "mine.json" in line and "'badvideo'" in line and named in line


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_an_annotation_file_that_is_none_is_named(trainer, refused, tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    assert "mine.json" in refused(trainer.flags(tmp_path / "run", *SHORT, "--annotations", str(path)))


def test_a_missing_annotation_file_is_named(trainer, refused, tmp_path: Path) -> None:
    assert "nowhere.json" in refused(trainer.flags(tmp_path / "run", *SHORT, "--annotations", "nowhere.json"))


@pytest.mark.parametrize("content", [None, b"", b"these bytes are no video"])
def test_a_missing_or_unreadable_video_is_named(
    trainer, annotated, refused, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "lost.mp4").write_bytes(content)
    words = trainer.flags(tmp_path / "run", *SHORT, *annotated(lost=GOOD), "--videos", str(tmp_path))
    assert "lost.mp4" in refused(words)


def test_skipped_videos_are_replaced_counted_and_listed(
    trainer, clips: Path, annotated, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on with the other videos; an evaluation counts the skipped ones as wrong."""
    good = json.loads((clips / "annotations/train.json").read_text())
    name = next(iter(good))
    words = annotated(lost=GOOD, **{name: good[name]})
    evaluated = ("--eval_annotations", words[1], "--max_eval_samples", "3", "--eval_batch_size", "1")
    with caplog.at_level(logging.WARNING):
        rows = trainer.main(tmp_path / "run", "--phases", "sft:4", *words, *evaluated, "--on_bad_video", "skip")
    assert [row["step"] for row in rows if row["phase"] == "sft/answer"] == [0, 1, 2, 3]
    assert "skipped videos: 1" in caplog.text and "lost.mp4" in caplog.text
    answers = (tmp_path / "run/eval/start_answer.jsonl").read_text().splitlines()
    lost = next(row for row in map(json.loads, answers) if "lost" in row["video"])
    assert lost["text"] == "" and lost["iou"] == 0


def test_nothing_but_bad_videos_is_refused_even_when_skipping(trainer, annotated, refused, tmp_path: Path) -> None:
    words = [*annotated(lost=GOOD, gone=GOOD), "--on_bad_video", "skip"]
    line = refused(trainer.flags(tmp_path / "run", *SHORT, *words))
    assert "none of the 2 samples has a readable video" in line and "mp4" in line


def test_a_batch_of_nothing_but_skipped_videos_scores_zero(trainer, tmp_path: Path) -> None:
    class NoVideos:
        config = DataConfig()

        def prompts(self, samples: list, modes: list) -> list:
            return []

    run = trainer.run(tmp_path / "unused", *SHORT)
    rows = evaluate(run.train_samples[:2], "answer", run.greedy, NoVideos(), batch_size=2)  # type: ignore[arg-type]
    assert [row["iou"] for row in rows] == [0, 0]


def test_a_checkpoint_of_another_architecture_is_refused_by_its_name(trainer, refused, tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "other")
    line = refused(trainer.flags(tmp_path / "run", *SHORT, "--model", str(tmp_path / "other")))
    assert "other" in line and "gpt2" in line and "qwen2_5_vl, qwen3_vl" in line


def test_a_folder_without_a_model_is_named(trainer, refused, tmp_path: Path) -> None:
    line = refused(trainer.flags(tmp_path / "run", *SHORT, "--model", str(tmp_path)))
    assert str(tmp_path) in line and "config.json" in line


@pytest.mark.parametrize(
    ("file", "content"), [("config.json", "{"), ("model.safetensors", None), ("model.safetensors", "too short")]
)
def test_a_damaged_checkpoint_is_named(
    trainer, checkpoint: Path, refused, tmp_path: Path, file: str, content: str | None
) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "damaged")
    (damaged / file).unlink()
    if content is not None:
        (damaged / file).write_text(content)
    assert str(damaged) in refused(trainer.flags(tmp_path / "run", *SHORT, "--model", str(damaged)))


def test_a_checkpoint_without_a_chat_template_is_named(trainer, checkpoint: Path, refused, tmp_path: Path) -> None:
    silent = shutil.copytree(checkpoint, tmp_path / "silent")
    tokenizer = AutoTokenizer.from_pretrained(silent)
    tokenizer.chat_template = None
    for file in silent.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(silent)
    line = refused(trainer.flags(tmp_path / "run", *SHORT, "--model", str(silent)))
    assert "silent" in line and "chat template" in line


def test_a_tokenizer_with_another_video_token_is_named(trainer, checkpoint: Path, refused, tmp_path: Path) -> None:
    swapped = shutil.copytree(checkpoint, tmp_path / "swapped")
    config = json.loads((swapped / "config.json").read_text())
    config["video_token_id"] -= 1
    (swapped / "config.json").write_text(json.dumps(config))
    line = refused(trainer.flags(tmp_path / "run", *SHORT, "--model", str(swapped)))
    assert "swapped" in line and "video_token_id" in line


def test_unknown_flags_and_values_are_named(trainer, refused, tmp_path: Path) -> None:
    assert "--shapping" in refused(trainer.flags(tmp_path, "--shapping", "mixed"))
    assert "'mixd'" in refused(trainer.flags(tmp_path, "--shaping", "mixd"))


@pytest.mark.parametrize("core", ["flex", "varlen"])
def test_an_attention_core_that_cannot_train_here_is_named(trainer, refused, tmp_path: Path, core: str) -> None:
    said = refused(trainer.flags(tmp_path / "run", *SHORT, "--attention_core", core))
    assert f"attention_core='{core}': needs a CUDA GPU" in said and "choose auto or split" in said


@pytest.mark.parametrize(
    "text", ["zero: 2", "[]", '{"gradient_accumulation_steps": 4}', '{"zero_optimization": {"stage": 4}}']
)
def test_a_deepspeed_file_that_cannot_be_used_is_named(trainer, refused, tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    assert "ds.json" in refused(trainer.flags(tmp_path / "run", *SHORT, "--deepspeed_config", str(path)))


def test_a_folder_that_holds_a_run_is_not_overwritten(trainer, finished_run, refused) -> None:
    before = (finished_run.folder / "metrics.jsonl").read_bytes()
    line = refused(trainer.flags(finished_run.folder, *SHORT))
    assert str(finished_run.folder) in line and "--resume" in line
    assert (finished_run.folder / "metrics.jsonl").read_bytes() == before


def test_resuming_a_folder_that_holds_no_run_is_refused(refused, tmp_path: Path) -> None:
    line = refused(["--resume", str(tmp_path)])
    assert str(tmp_path) in line and "no run in this folder" in line


def test_a_replay_file_that_lacks_a_step_is_named(trainer, refused, tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    recording = trainer.run(tmp_path / "unused", "--phases", "grpo:2", "--record_rollouts", str(path))
    at = next(plan(recording.phases))
    recording.answer(at, recording.prompts(at))
    line = refused(trainer.flags(tmp_path / "run", "--phases", "grpo:2", "--replay_rollouts", str(path)))
    assert "recorded.jsonl" in line and "step 1" in line


def test_a_missing_replay_file_is_named(trainer, refused, tmp_path: Path) -> None:
    assert "nowhere.jsonl" in refused(
        trainer.flags(tmp_path / "run", "--phases", "grpo:1", "--replay_rollouts", "nowhere.jsonl")
    )


@contextmanager
def no_file_longer_than(num_bytes: int) -> Iterator[None]:
    """Writes beyond it fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("written_first", ["nothing", "the engine's state"])
def test_a_full_disk_while_saving_leaves_the_previous_checkpoint(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_first: str
) -> None:
    """The error names the checkpoint, nothing unfinished stays, and the run can be resumed."""
    folder = tmp_path / "run"
    save = Run.save

    def save_on_a_full_disk(run: Run, num_steps: int) -> None:
        if num_steps == 1:
            save(run, num_steps)
            return
        if written_first != "nothing":
            monkeypatch.setattr(run.engine, "save_checkpoint", lambda *_, **__: True)
        with no_file_longer_than(100_000):
            save(run, num_steps)

    monkeypatch.setattr(Run, "save", save_on_a_full_disk)
    line = refused(trainer.flags(folder, "--phases", "sft:2", "--save_steps", "1"))
    assert "step_000002" in line
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
    assert latest_checkpoint(folder) == (folder / "checkpoints/step_000001", 1)


def test_an_unfinished_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    for name in ("step_000001", "step_000002.partial", "step_000003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step_000001", "step_000002.partial"):
        (tmp_path / "checkpoints" / name / "state.json").write_text('{"step": 1}')
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000001"]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--model": "./nowhere"}, "./nowhere"),
        ({"--video": "nowhere.mp4"}, "nowhere.mp4"),
        ({"--query": "  "}, "query is empty"),
        ({"--max_completion_length": "0"}, "max_completion_length=0"),
    ],
)
def test_inference_names_what_is_wrong(
    finished_run, clips: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], named: str
) -> None:
    model = latest_checkpoint(finished_run.folder)[0] / "model"
    video = next((clips / "videos").glob("*.mp4"))
    words = {"--model": str(model), "--video": str(video), "--query": "a square"} | changed
    capsys.readouterr()
    assert infer_main([word for pair in words.items() for word in pair]) == 2
    output = capsys.readouterr()
    assert output.out == "" and named in output.err and output.err.count("\n") == 1

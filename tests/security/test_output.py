"""What strangers wrote and a terminal or an error shows: on one line, printable, and never a traceback."""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.data import text_files
from tempsamp_fast.data.annotations import read_annotations
from tempsamp_fast.plan import main as plan
from tempsamp_fast.report.__main__ import main as report
from tempsamp_fast.score import main as score
from tempsamp_fast.system.files import log_printably, one_line

GOOD = {"duration": 8.0, "timestamps": [[1.0, 3.0]], "sentences": ["a square appears"]}
ESCAPE = "\x1b]0;owned\x07\x9b31m‮"


def test_an_error_line_holds_nothing_that_a_terminal_obeys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line(ValueError(f"a{ESCAPE}\nb\tc é"))
    assert line.isprintable() and line.endswith("b c é") and line.startswith(r"a\x1b]0;owned\x07\x9b31m\u202e")
    annotations, predictions = tmp_path / f"a{ESCAPE[:3]}.json", tmp_path / "p.jsonl"
    annotations.write_text(json.dumps({"clip": GOOD}))
    predictions.write_text(json.dumps({"sample_id": ESCAPE}))
    for words in (["--annotations", "p.jsonl", "--predictions", f"{ESCAPE}"], ["--annotations", str(annotations)]):
        with pytest.raises(SystemExit):
            score(["--predictions", str(predictions), *words])
        assert capsys.readouterr().err.rstrip("\n").isprintable()


@pytest.mark.parametrize("video", [f"clip{ESCAPE}", "clip\n", "clip\x00", "a/\x1b[2J/b"])
def test_a_video_id_prints(tmp_path: Path, video: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({video: GOOD}))
    with pytest.raises(ValueError, match="not a path inside the video folder") as error:
        read_annotations(path, tmp_path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{"duration": 10**400}, {"duration": -(10**400)}, {"timestamps": [[0, 10**400]]}, {"duration": float("nan")}],
)
def test_a_number_larger_than_any_is_an_error_with_its_place(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"clip": GOOD | changed}))
    with pytest.raises(ValueError, match=r"mine\.json: video 'clip', query 0: .*expected a finite number"):
        read_annotations(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "1" * 5000])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_deep_or_endless_json_is_an_error_with_its_place(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"mine\{suffix}.*malformed JSON"):
        read_annotations(path)


def test_what_is_logged_holds_nothing_that_a_terminal_obeys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """By any library, and by the doors that print plans and findings."""
    log_printably()
    logging.getLogger("transformers").warning("model of type %s", ESCAPE)
    logging.getLogger(__name__).warning("first\nsecond")
    assert "\x1b" not in caplog.text and r"\x1b]0;owned" in caplog.text and "first\nsecond" in caplog.text
    row = {"label": f"{ESCAPE} packed", "ms": 1.0, "tflop": 1.0, "mfu": 0.5}
    sampled = {"label": "8 prompts ours", "ms": 1.0, "tokens_per_s": 9.0, "rollouts_per_s": 1.0}
    sections = {"update": {"rows": [row]}, "rollout": {"rows": [sampled]}}
    (tmp_path / "gpu.json").write_text(json.dumps({"gpu": ESCAPE, "sections": sections}))
    assert plan(["--measured", str(tmp_path / "gpu.json"), "--phases", "sft:1"]) == 0
    assert "owned" in (printed := capsys.readouterr().out) and "\x1b" not in printed


@pytest.mark.parametrize("flaw", [{"rollouts_per_s": 0}, {"ms": "x"}, {"tokens_per_s": None}, {"ms": 10**400}])
def test_measurements_of_anything_are_one_line(
    tmp_path: Path, flaw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"label": "7 packed", "ms": 1.0, "tflop": 1.0, "mfu": 0.5}
    sampled = {"label": "8 prompts ours", "ms": 1.0, "tokens_per_s": 9.0, "rollouts_per_s": 1.0} | flaw
    sections = {"update": {"rows": [row]}, "rollout": {"rows": [sampled]}}
    (tmp_path / "gpu.json").write_text(json.dumps({"gpu": "x", "sections": sections}))
    assert plan(["--measured", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(1 << 40)  # takes no room on the disk


def zipped(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b" " * (1 << 21))


def lists(path: Path) -> None:
    path.write_text("[" + "[]," * (1 << 15) + "[]]")


def one_long_line(path: Path) -> None:
    path.write_text('{"a": [' + "0," * (1 << 16) + "0]}")


@pytest.mark.parametrize("make", [pipe, endless, zipped, lists, one_long_line])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_text_without_end_is_not_read(
    tmp_path: Path, make: Any, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Annotations, and predictions, which are read alike: in a few seconds and without filling the memory."""
    if make is zipped:
        monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 1 << 20)
    if make in (lists, one_long_line):
        monkeypatch.setattr(text_files, "MAX_VALUES", 1 << 16)
    path = tmp_path / f"mine{suffix}"
    make(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"cannot be read|holds more than|not a UTF-8 text"):
        read_annotations(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4 << 20  # KiB


def test_a_report_of_anything_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run leaves, with values of every kind in every field of its records."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    config = {
        "data": {"task": "grounding"},
        "model": {"model": "m"},
        "algorithm": {},
        "train": {"seed": 0, "phases": "p"},
    }
    rows: dict[str, dict[str, Any]] = {
        "config.json": config,
        "metrics.jsonl": {"step": 0, "phase": "p", "reward/on_policy_mean": 0.5, "reward/tiou": 0.5, "time/step_s": 1},
        "groups.jsonl": {"step": 0, "phase": "p", "rewards": {"tiou": [0.1, 0.9]}, "advantages": [-1.0, 1.0],
                         "is_off_policy": [False, True]},
        "eval/start_answer.jsonl": {"sample_id": "a", "video": "/none.mp4", "query": "q", "duration_s": 9.0,
                                    "windows": [[1.0, 2.0]], "span": [1.0, 3.0], "iou": 0.5},
    }  # fmt: skip

    def write(name: str, row: Any) -> None:
        (run / name).write_text(json.dumps(row) + "\n")

    def outcome() -> str:
        try:
            report([str(run)])
        except SystemExit as exit_:
            assert exit_.code == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error[:-1].isprintable() and len(error) < 1000
            return "refused"
        assert (run / "report.html").read_text().count("<script") == 2  # its own
        return "drawn"

    for name, row in rows.items():
        write(name, row)
    assert outcome() == "drawn"
    values = cycle([10**400, [], "<script>\x1b[31m", {"a": {}}, None, float("nan"), [None], -1, [[]]])
    outcomes = set()
    for name, row in rows.items():
        for field in list(row)[::3]:
            write(name, row | {field: next(values)})
            outcomes.add(outcome())
        write(name, row)
    assert outcomes == {"refused", "drawn"}

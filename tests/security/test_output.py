"""What strangers wrote and a terminal or an error shows: on one line, printable, and never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.data.annotations import read_annotations
from tempsamp_fast.score import main as score
from tempsamp_fast.system.files import one_line

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

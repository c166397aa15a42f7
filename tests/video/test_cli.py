"""`python -m tempsamp_fast.video`: the figures it prints are those of the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tempsamp_fast.video import Geometry, Sampling
from tempsamp_fast.video.__main__ import main
from tempsamp_fast.video.probe import FileFacts, header_facts, probe, warnings_of


def test_probe_tells_what_the_file_is_and_what_is_taken(corpus: Path) -> None:
    report = probe(corpus / "h264.mp4", Sampling(), Geometry())
    facts, taken = report["facts"], report["sampling"]
    assert (facts["codec"], facts["height"], facts["width"], facts["num_frames"], facts["fps"]) == (
        "h264",
        56,
        280,
        150,
        25,
    )
    assert facts["duration_s"] == pytest.approx(6.0)
    assert taken["num_frames"] == 12 and taken["frame_times_s"][:2] == [0.0, 0.48]
    grid_t, grid_h, grid_w = taken["grid_thw"]
    assert taken["num_tokens"] == grid_t * grid_h * grid_w // 4
    assert report["status"] == "ok" and report["warnings"] == []


def test_header_alone_gives_the_same_facts(corpus: Path) -> None:
    facts = header_facts(corpus / "hevc.mp4")
    assert (facts.codec, facts.height, facts.width, facts.num_frames, facts.fps) == ("hevc", 56, 280, 150, 25)


def test_probe_warns_of_what_hurts(corpus: Path) -> None:
    assert any(
        "TRUNCATED" in text or "DAMAGED" in text
        for text in probe(corpus / "truncated.mp4", Sampling(), Geometry())["warnings"]
    )


@pytest.mark.parametrize(
    ("changed", "warned"),
    [
        ({}, []),
        ({"longest_frame_s": 0.09}, ["variable frame rate"]),
        ({"shortest_frame_s": 0.0}, ["variable frame rate", "same time"]),
        ({"duration_s": 61.0}, ["over 30 s between key frames"]),
        ({"trouble": "errors in packet 8"}, ["errors in packet 8"]),
    ],
)
def test_warnings_are_of_what_training_on_the_file_would_meet(changed: dict, warned: list[str]) -> None:
    """Of an even minute with a key frame every thirty seconds, nothing is said."""
    facts = FileFacts("mp4", "h264", 56, 280, 1500, 25.0, 0.0, 60.0, 2, 0.0, 0.04, 0.04)
    found = warnings_of(dataclasses.replace(facts, **changed))
    assert len(found) == len(warned) and all(part in text for part, text in zip(warned, found, strict=True))


def test_command_prints_one_object_per_file_and_fails_with_a_bad_one(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(corpus / "vp9.webm")]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["codec"] == "vp9"
    assert main(["probe", str(corpus / "prose.mp4")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["code"] == "OPEN_FAILED" and "prose.mp4" in report["message"]


def test_a_probe_samples_as_it_is_asked_to(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mode", "hf_qwen3", "--fps", "1", "--family", "qwen3_vl"]
    assert main(["probe", *words, str(corpus / "h264.mp4")]) == 0
    taken, geometry = json.loads(capsys.readouterr().out)["sampling"], Geometry.of_family("qwen3_vl")
    assert (taken["mode"], taken["num_frames"]) == ("hf_qwen3", 6)
    assert taken["grid_thw"] == list(geometry.grid_thw(6, geometry.frame_size(6, 56, 280)))


def test_bench_times_every_video_of_a_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip.mp4").write_bytes((corpus / "h264.mp4").read_bytes())
    (tmp_path / "notes.txt").write_text("no video")
    assert main(["bench", str(tmp_path), "--rounds", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "frames/s" in header and len(rows) == 1 and rows[0].split()[:2] == ["clip.mp4", "12"]
    (tmp_path / "clip.mp4").unlink()
    assert main(["bench", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["probe", "a.mp4", "--fps", "0"], "error: fps must be positive"),
        (["bench", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_arguments_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1

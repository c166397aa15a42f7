"""`python -m tempsamp_fast.video`: the figures it prints are those of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempsamp_fast.video import Geometry, Sampling
from tempsamp_fast.video.__main__ import main
from tempsamp_fast.video.probe import header_facts, probe


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


def test_command_prints_one_object_per_file_and_fails_with_a_bad_one(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", str(corpus / "vp9.webm")]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["codec"] == "vp9"
    assert main(["probe", str(corpus / "prose.mp4")]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["code"] == "OPEN_FAILED" and "prose.mp4" in report["message"]


def test_bench_times_every_video_of_a_folder(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip.mp4").write_bytes((corpus / "h264.mp4").read_bytes())
    (tmp_path / "notes.txt").write_text("no video")
    assert main(["bench", str(tmp_path), "--rounds", "1"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "frames/s" in header and len(rows) == 1 and rows[0].split()[:2] == ["clip.mp4", "12"]
    (tmp_path / "clip.mp4").unlink()
    assert main(["bench", str(tmp_path)]) == 1

"""`bench.video_sweep` tells right, refused, partial and wrong apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
from bench import video_sweep


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("h264.mp4", "right"),
        ("one_frame.gif", "right"),
        ("prose.mp4", "right"),  # neither reads it
        ("encrypted.mp4", "refused or right"),  # ffmpeg makes a few grey frames of it, or none
        ("truncated.mkv", "partial"),
    ],
)
def test_verdicts(name: str, verdict: str, corpus: Path) -> None:
    row = video_sweep.sweep_file(corpus / name, name, 20.0)
    assert row.verdict in verdict.split(" or ") and row.wrong == 0
    assert bool(row.reason) == (row.outcome != "ok OK")


@pytest.mark.parametrize("lost", [0, 75, 149])
def test_a_frame_too_many_or_another_one_is_wrong(lost: int, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the command line had decoded one frame less, or two of them in each other's place."""
    read = video_sweep.ffmpeg_frames

    def without_one(*arguments: object, **options: bool) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.delete(column, lost, axis=0) for column in read(*arguments, **options))  # type: ignore[arg-type, return-value]

    def exchanged(*arguments: object, **options: bool) -> tuple[np.ndarray, np.ndarray]:
        pictures, times_s = read(*arguments, **options)  # type: ignore[arg-type]
        order = np.arange(len(pictures))
        order[[lost, 30]] = 30, lost
        return pictures[order], times_s

    for other in (without_one, exchanged):
        monkeypatch.setattr(video_sweep, "ffmpeg_frames", other)
        assert video_sweep.sweep_file(corpus / "h264.mp4", "h264.mp4", 20.0).verdict == "wrong"

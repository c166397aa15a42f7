"""Folders of frames, and patches that were kept: pictures of strangers that are no pictures, or no patches."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.data.frame_folder import load_frame_folder
from tempsamp_fast.data.video_folder import VideoFolder
from tempsamp_fast.video import Geometry, Sampling, VideoError
from tempsamp_fast.video.patch_cache import PatchCache

GEOMETRY = Geometry.of_family("qwen2_5_vl", min_pixels=56 * 56, max_pixels=56 * 56)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/owned) (w) file closefile showpage\n"


def huge(path: Path) -> None:
    """A PNG that says it is 60,000 pixels wide and high."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk


PICTURES: dict[str, Callable[[Path], Any]] = {
    "a program for Ghostscript": lambda path: path.write_bytes(POSTSCRIPT),
    "another format": lambda path: Image.new("RGB", (56, 56)).save(path, format="TIFF"),
    "too many pixels": huge,
    "no end": endless,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


def folder_of(path: Path) -> Path:
    path.mkdir()
    for number in range(8):
        Image.fromarray(np.full((56, 56, 3), 20 * number, dtype=np.uint8)).save(path / f"{number}.png")
    (path / "fps.txt").write_text("2")
    return path


@pytest.mark.parametrize("what", PICTURES)
@pytest.mark.parametrize("name", ["0.png", "5.png"])
def test_a_frame_that_is_no_picture_is_refused(tmp_path: Path, what: str, name: str) -> None:
    """Whatever its suffix: Pillow would start Ghostscript for one, and read dozens of formats."""
    folder = folder_of(tmp_path / "clip")
    (folder / name).unlink()
    PICTURES[what](folder / name)
    with pytest.raises(VideoError, match=name):
        load_frame_folder(folder, Sampling(fps=2.0), GEOMETRY)


@pytest.mark.parametrize("make", [endless, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_frame_rate_without_end_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    folder = folder_of(tmp_path / "clip")
    (folder / "fps.txt").unlink()
    make(folder / "fps.txt")
    with pytest.raises(VideoError, match=r"fps\.txt"):
        load_frame_folder(folder, Sampling(fps=2.0), GEOMETRY)


def test_a_pipe_is_no_video(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.mp4")
    assert VideoFolder(tmp_path).find("clip") is None


PIXELS, TIMES = torch.zeros(4, GEOMETRY.row_width, dtype=torch.uint8), torch.zeros(1, dtype=torch.float64)
ENTRY = {"pixel_values": PIXELS, "grid_thw": (1, 2, 2), "second_per_grid": 1.0, "timestamps_s": TIMES}


@pytest.mark.parametrize(
    "changed",
    [{}, {"grid_thw": (10**9, 2, 2)}, {"grid_thw": "x"}, {"grid_thw": (0, 2, 2)}, {"pixel_values": None},
     {"pixel_values": PIXELS[:3]}, {"second_per_grid": float("nan")}, {"second_per_grid": "x"},
     {"timestamps_s": PIXELS}, {"surprise": 1}, {"features": [1]}, None],
)  # fmt: skip
def test_kept_patches_that_fit_no_video_are_made_again(tmp_path: Path, changed: dict[str, Any] | None) -> None:
    """Entries of a shared folder; an honest one comes back. A pipe in its place is not waited for."""
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"a video")
    cache, sampling = PatchCache(tmp_path / "kept", GEOMETRY), Sampling()
    cache.put(video, sampling, VideoPatches(**ENTRY))  # type: ignore[arg-type]
    (entry,) = cache.folder.iterdir()
    assert cache.get(video, sampling) is not None
    if changed is None:
        entry.unlink()
        os.mkfifo(entry)
    else:
        stored = torch.load(entry, weights_only=True)
        torch.save(stored | changed, entry)
    assert (cache.get(video, sampling) is None) == (changed != {})

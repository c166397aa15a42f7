"""Patches on disk: kept for one state of a file and of the settings, and never trusted when damaged."""

from __future__ import annotations

from pathlib import Path

import torch

from tempsamp_fast.video import Sampling, load_videos
from tempsamp_fast.video.patch_cache import PatchCache
from tests.video.verdict import GEOMETRY

SAMPLING = Sampling()


def test_disk_cache_forgets_a_file_that_changed_and_survives_damage(corpus: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes((corpus / "h264.mp4").read_bytes())
    cache = PatchCache(tmp_path / "patches", GEOMETRY)
    patches = load_videos([(video, SAMPLING)], GEOMETRY, dtype=torch.uint8).split()[0]
    cache.put(video, SAMPLING, patches)
    assert cache.get(video, SAMPLING) is not None
    assert cache.get(video, Sampling(fps=1.0)) is None
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(b"damaged")
    assert cache.get(video, SAMPLING) is None
    cache.put(video, SAMPLING, patches)
    video.write_bytes((corpus / "hevc.mp4").read_bytes())
    assert cache.get(video, SAMPLING) is None

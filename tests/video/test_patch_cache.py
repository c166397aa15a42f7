"""Patches on disk: kept for one state of a file and of the settings, and never trusted when damaged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from tempsamp_fast.batch import VideoPatches, VisionFeatures
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


def test_an_entry_is_for_one_file_one_geometry_and_one_tower(tmp_path: Path) -> None:
    video, other = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (video, other):
        path.write_bytes(b"the same bytes")
    os.utime(other, ns=(video.stat().st_atime_ns, video.stat().st_mtime_ns))
    features = VisionFeatures(torch.ones(1, 4), (torch.zeros(1, 4),))
    patches = VideoPatches(torch.zeros(0, 8), (1, 2, 2), 1.0, torch.zeros(1, dtype=torch.float64), features)
    folder = tmp_path / "patches"
    PatchCache(folder, GEOMETRY, "one tower").put(video, SAMPLING, patches)
    kept = PatchCache(folder, GEOMETRY, "one tower").get(video, SAMPLING)
    assert kept is not None and kept.features is not None and kept.features.embeds.equal(features.embeds)
    assert PatchCache(folder, GEOMETRY, "another tower").get(video, SAMPLING) is None
    assert PatchCache(folder, GEOMETRY).get(video, SAMPLING) is None
    smaller = replace(GEOMETRY, max_pixels=GEOMETRY.min_pixels)
    assert PatchCache(folder, smaller, "one tower").get(video, SAMPLING) is None
    assert PatchCache(folder, GEOMETRY, "one tower").get(other, SAMPLING) is None


def test_a_file_of_another_time_or_another_size_is_another(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    cache, times = PatchCache(tmp_path / "patches", GEOMETRY), torch.zeros(1, dtype=torch.float64)
    for content, seconds in ((b"1234", 1000), (b"5678", 1001), (b"56789", 1001)):
        video.write_bytes(content)
        os.utime(video, (seconds, seconds))
        assert cache.get(video, SAMPLING) is None
        cache.put(video, SAMPLING, VideoPatches(torch.zeros(4, 8, dtype=torch.uint8), (1, 2, 2), 1.0, times))
        assert cache.get(video, SAMPLING) is not None

"""Frames at the edges of the rules: times that are the same within the tolerance, odd counts, bounds that just hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tempsamp_fast.video.geometry import Geometry, smart_resize, smart_resize_video
from tempsamp_fast.video.patches import patchify
from tempsamp_fast.video.result import VideoResult
from tempsamp_fast.video.sampling import TOLERANCE_S, Mode, Sampling, frames_on_screen, sample_indices, sample_times

SHOWN = np.array([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ("time_s", "frame"), [(1.0, 1), (1.0 - TOLERANCE_S / 2, 1), (1.0 - 2 * TOLERANCE_S, 0), (-5.0, 0), (9.0, 2)]
)
def test_a_frame_is_on_screen_from_its_time_on_within_the_tolerance(time_s: float, frame: int) -> None:
    """Before the first frame, the first; after the last, the last."""
    assert frames_on_screen(np.array([time_s]), SHOWN).tolist() == [frame]


@pytest.mark.parametrize(("short_s", "count"), [(0.0, 8), (TOLERANCE_S / 2, 8), (1e-3, 6)])
def test_a_video_a_hair_too_short_has_all_frames_of_its_length(short_s: float, count: int) -> None:
    """Four seconds at two frames a second."""
    times, step = sample_times(Sampling("pts"), 100, 4.0 - short_s)
    assert len(times) == count and step == 0.5
    assert times.tolist() == pytest.approx((np.arange(count) / 2).tolist())


def test_a_part_of_a_video_a_hair_too_short_has_all_frames_of_its_length() -> None:
    """Also the frames that there are are counted within the tolerance: 4 of 8 in the half."""
    times, _ = sample_times(Sampling("pts", 10.0, start_s=2.0), 8, 4.0 - TOLERANCE_S / 4)
    assert len(times) == 4 and times[0] == 2.0


@pytest.mark.parametrize(
    ("mode", "bounds", "num_frames", "count"),
    [
        ("pts", {"min_frames": 5}, 25, 4),
        ("hf_qwen2", {"min_frames": 5}, 25, 4),
        ("qwen_utils", {"min_frames": 5}, 25, 6),
        ("hf_qwen3", {"min_frames": 5}, 25, 5),
        ("pts", {"max_frames": 7}, 1000, 6),
        ("hf_qwen2", {"max_frames": 7}, 1000, 6),
        ("qwen_utils", {"max_frames": 7}, 1000, 6),
        ("hf_qwen3", {"max_frames": 7}, 1000, 7),
        ("pts", {}, 3, 2),
        ("hf_qwen2", {}, 3, 2),
        ("qwen_utils", {}, 3, 2),
        ("hf_qwen3", {}, 3, 3),
        ("pts", {}, 2, 2),
        ("hf_qwen2", {}, 2, 2),
        ("qwen_utils", {}, 2, 2),
        ("hf_qwen3", {}, 2, 2),
        ("pts", {"min_frames": 2, "max_frames": 2}, 1000, 2),
    ],
)
def test_odd_counts_are_made_even_as_the_rule_says(mode: Mode, bounds: dict, num_frames: int, count: int) -> None:
    """Down, but for the least of qwen-vl-utils; transformers' Qwen3 rule keeps them odd. Of 25 frames a second."""
    sampling = Sampling(mode, **bounds)
    if mode == "pts":
        assert len(sample_times(sampling, num_frames, num_frames / 25)[0]) == count
    else:
        assert len(sample_indices(sampling, num_frames, 25.0)[0]) == count


def test_the_last_frame_of_an_odd_number_is_repeated() -> None:
    geometry = Geometry()
    frames = torch.randint(0, 255, (3, 3, 28, 28), dtype=torch.uint8)
    assert geometry.grid_thw(3, (28, 28)) == (2, 2, 2) and geometry.grid_thw(4, (28, 28)) == (2, 2, 2)
    rows = patchify(frames, geometry)
    assert torch.equal(rows, patchify(torch.cat([frames, frames[-1:]]), geometry)) and len(rows) == 8
    result = VideoResult("v.mp4", "ok", "ok", num_frames=3, frame_times_s=torch.tensor([0.0, 1.0, 5.0]))  # type: ignore[arg-type]
    assert result.timestamps_s().tolist() == [0.5, 5.0]


def test_bounds_on_pixels_are_included() -> None:
    """Rounded to exactly the least and the most pixels, a frame, or a video, is not resized once more."""
    assert smart_resize(60, 50, 28, min_pixels=56 * 56, max_pixels=56 * 56) == (56, 56)
    assert smart_resize_video(4, 68, 60, 32, min_pixels=4 * 64 * 64, max_pixels=4 * 64 * 64) == (64, 64)
    assert smart_resize(28, 28 * 200, 28, 1, 10**9) == (28, 28 * 200)
    assert smart_resize_video(2, 32, 32, 32, 1, 10**9) == (32, 32)
    with pytest.raises(ValueError, match="num_frames must be at least 2"):
        smart_resize_video(1, 32, 32, 32, 1, 10**9)


def test_geometry_takes_bounds_that_meet_and_the_least_sizes() -> None:
    assert Geometry(min_pixels=784, max_pixels=784, total_pixels=784).frame_size(2, 50, 50) == (28, 28)
    assert Geometry(patch_size=1, temporal_patch_size=1, merge_size=1, min_pixels=1).factor == 1
    for bounds in ({"min_frames": 2, "max_frames": 2}, {"min_frames": 4, "max_frames": 4}):
        assert Sampling(**bounds).max_frames == bounds["max_frames"]


def test_a_frames_share_of_the_budget_is_a_twentieth_over_the_least_at_least() -> None:
    """Of 20 merged patches as the least, 21 are within it: so qwen-vl-utils shares out."""
    least = 20 * 784
    geometry = Geometry(min_pixels=least, max_pixels=10 * least, total_pixels=least)
    assert geometry.frame_size(100, 84, 196) == (84, 196)

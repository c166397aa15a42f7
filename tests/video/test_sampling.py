"""Which frames are wanted: the four rules against their sources."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tempsamp_fast.video.sampling import Sampling, frames_on_screen, sample_indices, sample_times

NUM_FRAMES = st.integers(4, 5000)
VIDEO_FPS = st.sampled_from([10.0, 15.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0])
SAMPLE_FPS = st.sampled_from([0.5, 1.0, 2.0, 3.7, 8.0])


@given(NUM_FRAMES, VIDEO_FPS, SAMPLE_FPS)
def test_hf_qwen3_takes_the_frames_transformers_takes(num_frames: int, video_fps: float, fps: float) -> None:
    defaults = SimpleNamespace(min_frames=4, max_frames=768, fps=2)
    metadata = SimpleNamespace(total_num_frames=num_frames, fps=video_fps)
    theirs = Qwen3VLVideoProcessor.sample_frames(defaults, metadata=metadata, fps=fps)
    ours, _ = sample_indices(Sampling("hf_qwen3", fps), num_frames, video_fps)
    assert ours.tolist() == theirs.tolist()


@given(NUM_FRAMES, VIDEO_FPS, SAMPLE_FPS)
def test_hf_qwen2_follows_the_formula_of_transformers(num_frames: int, video_fps: float, fps: float) -> None:
    """Written out: that processor cannot be imported without torchvision."""
    wanted = min(max(num_frames / video_fps * fps, 4), math.floor(min(768, num_frames) / 2) * 2, num_frames)
    count = math.floor(wanted / 2) * 2
    ours, second_per_frame = sample_indices(Sampling("hf_qwen2", fps), num_frames, video_fps)
    assert ours.tolist() == torch.arange(0, num_frames, num_frames / count).int().tolist()[:count]
    assert second_per_frame == pytest.approx(num_frames / video_fps / count)


@given(NUM_FRAMES, VIDEO_FPS, SAMPLE_FPS, st.sampled_from([(0.0, None), (0.3, 5.0), (0.1, None), (0.0, 1e6)]))
def test_qwen_utils_mode_follows_its_published_formula(
    num_frames: int, video_fps: float, fps: float, window: tuple[float, float | None]
) -> None:
    start_s, end_s = window
    first = math.ceil(start_s * video_fps)
    last = num_frames - 1 if end_s is None else min(math.floor(end_s * video_fps), num_frames - 1)
    total = last - first + 1
    indices, second_per_frame = sample_indices(
        Sampling("qwen_utils", fps, 4, 768, start_s, end_s), num_frames, video_fps
    )
    if total < 2:
        assert len(indices) == 0
        return
    wanted = min(min(max(total / video_fps * fps, 4), min(768, total) // 2 * 2), total)
    count = math.floor(wanted / 2) * 2
    assert indices.tolist() == torch.linspace(first, last, count).round().long().tolist()
    assert second_per_frame == pytest.approx(total / video_fps / count)


@given(NUM_FRAMES, VIDEO_FPS, SAMPLE_FPS)
def test_pts_mode_ticks_exactly_at_fps_unless_a_bound_on_the_frames_stretches_it(
    num_frames: int, video_fps: float, fps: float
) -> None:
    """As many frames as hf_qwen2 takes, but on the clock: multiples of 1 / fps where the bounds on frames allow."""
    times, step = sample_times(Sampling("pts", fps), num_frames, num_frames / video_fps)
    theirs, their_step = sample_indices(Sampling("hf_qwen2", fps), num_frames, video_fps)
    assert len(times) == len(theirs)
    assert times.tolist() == pytest.approx((np.arange(len(times)) * step).tolist())
    bound = their_step < 1 / fps - 1e-9 or their_step * len(times) >= (len(times) + 2) / fps
    assert step == pytest.approx(their_step if bound else 1 / fps, abs=1e-6)


def test_pts_mode_looks_at_the_clock_of_a_variable_frame_rate() -> None:
    """A burst of frames in the first second gets its share of time, not of frames."""
    shown = np.concatenate([np.linspace(0, 1, 90, endpoint=False), np.arange(1, 10)])
    times, second_per_frame = sample_times(Sampling(), len(shown), 10.0)
    assert second_per_frame == pytest.approx(0.5)
    taken = shown[frames_on_screen(times, shown)]
    assert taken[:6].tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0, 2.0, 2.0])


def test_a_frame_is_on_screen_from_its_own_time_on_whatever_the_clocks_rounding() -> None:
    """The time of a frame finds it, also where arithmetic lost the last digits; a millisecond before it does not."""
    shown = np.arange(300) / 30
    for lost in (0.0, 1e-9, 5e-7, -5e-7):
        assert frames_on_screen(shown - lost, shown).tolist() == list(range(300))
    assert frames_on_screen(shown[1:] - 1e-3, shown).tolist() == list(range(299))


@pytest.mark.parametrize(("mode", "count"), [("qwen_utils", 6), ("hf_qwen2", 4), ("hf_qwen3", 5)])
def test_an_odd_least_number_of_frames_is_rounded_as_each_source_does(mode: str, count: int) -> None:
    """qwen-vl-utils rounds `min_frames` up; transformers rounds the result down for Qwen2, and not for Qwen3."""
    assert len(sample_indices(Sampling(mode, 0.5, min_frames=5), 100, 25.0)[0]) == count  # type: ignore[arg-type]


@given(NUM_FRAMES, VIDEO_FPS, SAMPLE_FPS, st.floats(0, 50), st.floats(0.1, 100))
def test_pts_mode_stays_inside_the_window_and_is_even(
    num_frames: int, video_fps: float, fps: float, start_s: float, length_s: float
) -> None:
    duration_s = num_frames / video_fps
    times, step = sample_times(Sampling("pts", fps, 4, 768, start_s, start_s + length_s), num_frames, duration_s)
    assert len(times) % 2 == 0 and len(times) <= 768
    if len(times):
        assert times[0] == start_s
        end = min(start_s + length_s, duration_s)
        assert times[-1] + step <= end + 1e-6
        assert end - (times[-1] + step) < 2 / fps + 1e-6
    else:
        assert start_s >= duration_s


def test_a_single_frame_gives_nothing_to_sample() -> None:
    for mode in ("hf_qwen2", "hf_qwen3", "qwen_utils"):
        assert len(sample_indices(Sampling(mode), 1, 25.0)[0]) == 0  # type: ignore[arg-type]
    assert len(sample_times(Sampling(), 1, 0.04)[0]) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "every"},
        {"fps": 0.0},
        {"fps": math.nan},
        {"min_frames": 1},
        {"min_frames": 8, "max_frames": 4},
        {"start_s": -1.0},
        {"start_s": 5.0, "end_s": 5.0},
    ],
)
def test_out_of_range_values_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)

"""Which frames of a video are wanted. Four rules; all give the same frames to every backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

Mode = Literal["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"]

FRAME_FACTOR = 2
"""Frames per temporal patch: what the rules other than `hf_qwen3` round the number of frames down to."""
TOLERANCE_S = 1e-6
"""Times closer than this are the same time: container clocks and float64 arithmetic differ by less."""


@dataclass(frozen=True)
class Sampling:
    """How to take frames from one video.

    `pts`: every `1 / fps` seconds, and the frame on screen then (right for variable frame rates); the grid stretches
    over the whole part where `min_frames` or `max_frames` binds. `qwen_utils`: qwen-vl-utils, which the paper's runs
    used. `hf_qwen2`, `hf_qwen3`: the video processors of transformers 5.23. Raises ValueError on values out of range.
    """

    mode: Mode = "pts"
    fps: float = 2.0
    """Frames wanted per second of video."""
    min_frames: int = 4
    max_frames: int = 768
    start_s: float = 0.0
    """Begin of the wanted part, in seconds since the first frame."""
    end_s: float | None = None
    """End of the wanted part; None is the end of the video."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {get_args(Mode)}, got {self.mode!r}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be positive and finite, got {self.fps}")
        if not FRAME_FACTOR <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"need {FRAME_FACTOR} <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}"
            )
        if not (math.isfinite(self.start_s) and self.start_s >= 0):
            raise ValueError(f"start_s must be finite and not negative, got {self.start_s}")
        if self.end_s is not None and not (math.isfinite(self.end_s) and self.end_s > self.start_s):
            raise ValueError(f"end_s must be finite and after start_s ({self.start_s}), got {self.end_s}")


def sample_times(sampling: Sampling, num_frames: int, duration_s: float) -> tuple[np.ndarray, float]:
    """Times at which mode `pts` looks at the screen.

    Args: `num_frames` in the whole file; `duration_s` from the first frame to the end of the last.
    Returns ([n] float64 seconds since the first frame, seconds from one to the next); n is even, 0 where there are
    fewer than two frames to take.
    """
    end = duration_s if sampling.end_s is None else min(sampling.end_s, duration_s)
    span = max(end - sampling.start_s, 0.0)
    share = math.floor(num_frames * span / duration_s + TOLERANCE_S) if duration_s > 0 else 0
    available = max(share, min(num_frames, FRAME_FACTOR)) if span > 0 else 0
    count = _even_count(sampling, available, span + TOLERANCE_S)
    step = 1 / sampling.fps
    if not count * step <= span + TOLERANCE_S < (count + FRAME_FACTOR) * step:  # stretched by min_frames or max_frames
        step = span / max(count, 1)
    return sampling.start_s + np.arange(count) * step, step


def frames_on_screen(times_s: np.ndarray, frame_times_s: np.ndarray) -> np.ndarray:
    """Indices [n] int64 of the frames on screen at `times_s`: the last whose (sorted) time is not after it."""
    return np.maximum(np.searchsorted(frame_times_s, times_s + TOLERANCE_S, side="right") - 1, 0)


def sample_indices(sampling: Sampling, num_frames: int, fps: float) -> tuple[np.ndarray, float]:
    """Indices of the wanted frames in the modes that count frames (all but `pts`).

    Args: `num_frames` in the whole file; `fps` of the video as its header gives it.
    Returns ([n] int64, mean seconds from one to the next); n is 0 where there are fewer than two frames to take.
    """
    first = math.ceil(sampling.start_s * fps)
    last = num_frames - 1 if sampling.end_s is None else min(math.floor(sampling.end_s * fps), num_frames - 1)
    total = last - first + 1
    if total < FRAME_FACTOR:
        return np.empty(0, dtype=np.int64), 0.0
    if sampling.mode == "hf_qwen3":
        count = min(max(int(total / fps * sampling.fps), sampling.min_frames), sampling.max_frames, total)
        indices = first + np.linspace(0, total - 1, count).round().astype(np.int64)
    elif sampling.mode == "hf_qwen2":
        count = _even_count(sampling, total, total / fps)
        steps = torch.arange(0, total, total / count)[:count]  # rounding can add one past the last frame
        indices = first + steps.int().numpy().astype(np.int64)
    else:
        count = _even_count(sampling, total, total / fps)
        indices = torch.linspace(first, last, count).round().long().numpy()
    return indices, total / fps / count


def _even_count(sampling: Sampling, available: int, duration_s: float) -> int:
    """Frames to take: fps * duration, within the bounds and what there is, rounded down to even."""
    least = sampling.min_frames + (sampling.min_frames % FRAME_FACTOR if sampling.mode == "qwen_utils" else 0)
    most = min(sampling.max_frames, available) // FRAME_FACTOR * FRAME_FACTOR
    wanted = min(max(duration_s * sampling.fps, least), most)
    return int(wanted // FRAME_FACTOR * FRAME_FACTOR)

"""How a decoder did on one file of the corpus, judged by the numbers its frames show."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tempsamp_fast.video import Geometry, Sampling, VideoResult, load_videos
from tempsamp_fast.video.patches import unpatchify
from tempsamp_fast.video.sampling import frames_on_screen
from tests.video.corpus import FPS, Case, command_line_frames, key_flags, read

EVERY_FRAME = Sampling("hf_qwen3", fps=1e6)
TWO_PER_SECOND = Sampling("pts", fps=2.0)
GEOMETRY = Geometry(min_pixels=28 * 28, total_pixels=None)
SAME_TIME_S = 0.006
LONGEST_STEP_S = 2**32 / 90_000
"""Half the range of the clock of MPEG streams."""
HELD_BACK = 3
"""Frames that a decoder holds back for reordering: without times, they may lie on either side of a lost one."""


@dataclass(frozen=True)
class Verdict:
    """`wanted` frames can be had (the command line decodes them); `wrong` ones came back showing another number."""

    name: str
    wanted: int
    right: int
    wrong: int
    outcome: str
    """Status and code."""
    good: bool

    def row(self) -> dict[str, object]:
        return asdict(self)


@cache
def decoded(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[int], list[bytes]]:
    """Times, numbers and contents of all frames, as the command line decodes them."""
    times, frames = command_line_frames(path, size)
    return times, read(frames) if len(frames) else [], [hashlib.sha256(frame).digest() for frame in frames]


@cache
def truth(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Times and numbers of all frames, as the command line decodes them, on one clock: each part of a file whose clock
    starts again begins a frame after the one before."""
    times, numbers, _ = decoded(path, size)
    steps = np.diff(times)
    is_restart = (steps < 0) | (steps > LONGEST_STEP_S)
    usual = np.median(steps[~is_restart]) if (~is_restart).any() else 0.0
    return times[:1] + np.append(0.0, np.where(is_restart, usual, steps).cumsum()) if len(times) else times, numbers


def frames_of(rows: torch.Tensor, result: VideoResult, geometry: Geometry = GEOMETRY) -> torch.Tensor:
    """[num_frames, 3, height, width] uint8: the good frames of a result with uint8 patches."""
    return unpatchify(rows, result.grid_thw, geometry)[: result.num_frames]


def numbers_shown(rows: torch.Tensor, result: VideoResult, geometry: Geometry = GEOMETRY) -> list[int]:
    """The number on each good frame of a result with uint8 patches."""
    return read(frames_of(rows, result, geometry).numpy())


@cache
def whole_frames(path: Path) -> torch.Tensor:
    """All frames of a file that is not damaged, in order of presentation."""
    batch = load_videos([(path, EVERY_FRAME)], GEOMETRY, dtype=torch.uint8)
    return frames_of(batch.pixel_values, batch.results[0])


def judge(case: Case, folder: Path, backend: str) -> Verdict:
    """All frames by index, then two per second by the clock, from one backend of `load_videos`."""
    path = folder / case.name
    batch = load_videos(
        [(path, EVERY_FRAME), (path, TWO_PER_SECOND)],
        GEOMETRY,
        backend=backend,  # type: ignore[arg-type]
        dtype=torch.uint8,
        on_error="partial",
        deadline_s=10.0,
        num_threads=1,
    )
    every, sampled = batch.results
    outcome = f"{every.status} {every.code}"
    if case.expect == "refused":
        refused = every.status == sampled.status == "failed" and every.code in case.codes
        return Verdict(case.name, 0, 0, 0, outcome, refused and str(path) in every.message)
    shown = [
        [] if video is None else numbers_shown(video.pixel_values, result)
        for video, result in zip(batch.split(), batch.results, strict=True)
    ]
    if case.expect == "exact":
        _, numbers = truth(path, case.size)
        numbers = numbers * 2 if len(numbers) == 1 else numbers
        right = sum(ours == true for ours, true in zip(shown[0], numbers, strict=False))
        wrong = len(shown[0]) - right + wrong_on_the_clock(case, path, sampled, shown[1])
        good = every.status == sampled.status == "ok" and right == len(numbers) and not wrong
        return Verdict(case.name, len(numbers), right, wrong, outcome, good)
    (right, wrong), (_, wrong_sampled) = [
        (0, 0) if video is None else by_time(case, folder, result, frames_of(video.pixel_values, result))
        for video, result in zip(batch.split(), batch.results, strict=True)
    ]
    wanted, wrong = recoverable(case, folder), wrong + wrong_sampled
    is_told = not case.codes or every.code in case.codes
    return Verdict(case.name, wanted, right, wrong, outcome, right >= wanted and not wrong and is_told)


def wrong_on_the_clock(case: Case, path: Path, result: VideoResult, shown: list[int]) -> int:
    """Frames of an even time grid that are not the ones on screen at those times."""
    times, numbers = truth(path, case.size)
    if not shown or len(numbers) == 1:
        return sum(number not in numbers for number in shown)
    grid = np.arange(len(shown)) * result.second_per_grid / GEOMETRY.temporal_patch_size
    if result.status == "ok" and not math.isclose(len(shown) * grid[1], times[-1] - times[0], rel_tol=0.1, abs_tol=1.0):
        return len(shown)
    on_screen = [times[frames_on_screen(grid + slack, times - times[0])] for slack in (-SAME_TIME_S, 0.0, SAME_TIME_S)]
    wrong = 0
    for at, ours in enumerate(shown):
        allowed = {number for time, number in zip(times, numbers, strict=True) if any(time == s[at] for s in on_screen)}
        wrong += ours not in allowed
    return wrong


def by_time(case: Case, folder: Path, result: VideoResult, frames: torch.Tensor) -> tuple[int, int]:
    """(right, wrong) frames of a damaged file: right ones have the bits of the whole file's frame of the same time."""
    times, _ = truth(folder / case.pristine, case.size)
    whole = whole_frames(folder / case.pristine)
    if case.is_counted:
        times = np.arange(len(times)) / FPS
    times_s = result.frame_times_s.numpy() + result.begin_s
    nearest = np.abs(times - times_s[:, None]).argmin(axis=1)
    has_its_bits = (frames.numpy() == whole.numpy()[nearest]).all(axis=(1, 2, 3))
    right = int((has_its_bits & (np.abs(times[nearest] - times_s) < SAME_TIME_S)).sum())
    return right, len(frames) - right


def recoverable(case: Case, folder: Path) -> int:
    """Frames of a damaged file that the command line still decodes right, and that no lost frame precedes in its GOP:
    what was predicted from a lost frame is right by luck."""
    times, _, contents = decoded(folder / case.name, case.size)
    seen = dict(zip(times, contents, strict=True))
    keys = key_flags(folder / case.pristine)
    count, intact = 0, True
    times, _, contents = decoded(folder / case.pristine, case.size)
    for is_key, time, content in zip(keys, times, contents, strict=True):
        is_seen = content in seen.values() if case.is_counted else seen.get(time) == content
        intact = (intact or (is_key and not case.loses_count)) and is_seen
        count += intact
    return count - HELD_BACK if case.is_counted else count

"""Decoding with the C++ extension: two calls without the interpreter lock, one to index files, one to fill patches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast import _video
from tempsamp_fast.video.backend import LoadOptions, Request, usable_cores
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.patches import patchify, unpatchify
from tempsamp_fast.video.result import SINGLE_FRAME, Code, Limits, VideoError, VideoResult, failure
from tempsamp_fast.video.sampling import FRAME_FACTOR, Sampling, frames_on_screen, sample_indices, sample_times

NAME = "native"
DEFAULT_FPS = 25.0
"""Frames per second of a stream that tells neither times nor a rate, as FFmpeg takes it."""
MISSING, GOOD = 0, 1


def load(
    requests: Sequence[Request], geometry: Geometry, dtype: torch.dtype, options: LoadOptions
) -> tuple[Tensor, list[VideoResult]]:
    """See `backend.Backend`; the threads work on files and on parts of them that start at different key frames."""
    plans = make_plans(requests, geometry, dtype, options)
    left_s = [options.deadline_s - plan.index.read_s if isinstance(plan, Plan) else 0.0 for plan in plans]
    return decode_plans([path for path, _ in requests], plans, left_s, geometry, dtype, options)


def make_plans(
    requests: Sequence[Request], geometry: Geometry, dtype: torch.dtype, options: LoadOptions
) -> list[Plan | VideoError]:
    """Index the files; the frames to take of each, or why there are none. Arguments as `backend.Backend`."""
    paths = list(dict.fromkeys(path for path, _ in requests))
    answers = _video.index(
        [os.fsencode(path) for path in paths],
        [options.deadline_s] * len(paths),
        max_frame_pixels=options.limits.max_frame_pixels,
        max_num_frames=options.limits.max_num_frames,
        num_threads=options.num_threads or usable_cores(),
        index_folder=os.fsencode(options.index_folder or ""),
    )
    indexes = dict(zip(paths, answers, strict=True))
    return [_plan(*request, indexes[request[0]], geometry, dtype, options.limits) for request in requests]


def read_index(path: Path, deadline_s: float, limits: Limits) -> _video.Index:
    """The packet index of one file. Raises VideoError."""
    ((index, (code, message)),) = _video.index(
        [os.fsencode(path.absolute())],
        [deadline_s],
        max_frame_pixels=limits.max_frame_pixels,
        max_num_frames=limits.max_num_frames,
        num_threads=1,
    )
    if index is None:
        raise VideoError(path, cast(Code, code), message)
    return index


def decode_plans(
    paths: Sequence[Path],
    plans: Sequence[Plan | VideoError],
    deadlines_s: Sequence[float],
    geometry: Geometry,
    dtype: torch.dtype,
    options: LoadOptions,
) -> tuple[Tensor, list[VideoResult]]:
    """What `load` returns, of files that are indexed already; `deadlines_s` is what is left for decoding each."""
    sizes = [plan.num_patches(geometry) if isinstance(plan, Plan) else 0 for plan in plans]
    rows = torch.empty(sum(sizes), geometry.row_width, dtype=dtype)
    parts = rows.split(sizes)
    decoded = iter(
        _video.decode(
            [
                plan.request(part, geometry, max(deadline_s, 0.0))
                for plan, part, deadline_s in zip(plans, parts, deadlines_s, strict=True)
                if isinstance(plan, Plan)
            ],
            max_frame_pixels=options.limits.max_frame_pixels,
            num_threads=options.num_threads or usable_cores(),
        )
    )
    kept, results = [], []
    for path, plan, part in zip(paths, plans, parts, strict=True):
        try:
            if isinstance(plan, VideoError):
                raise plan
            states, status, _ = next(decoded)
            patches, result = plan.result(path, part, geometry, states, status, options.keep_partial)
        except VideoError as error:
            results.append(failure(error, NAME))
            continue
        kept.append(part.copy_(patches) if len(patches) == len(part) else patches)  # other frames, as many patches
        results.append(result)
    if sum(map(len, kept)) == len(rows):
        return rows, results
    return torch.cat(kept) if kept else rows[:0], results


@dataclass(frozen=True)
class Plan:
    """The frames wanted of one indexed file and the size that they become."""

    index: _video.Index
    frames: np.ndarray
    """[n] int64 places in order of presentation."""
    times_s: np.ndarray
    """[n] float64 seconds since the first frame of the file."""
    begin_s: float
    second_per_frame: float
    frame_size: tuple[int, int]
    note: str = ""

    def num_patches(self, geometry: Geometry) -> int:
        return math.prod(geometry.grid_thw(len(self.frames), self.frame_size))

    def request(self, out: Tensor, geometry: Geometry, deadline_s: float) -> dict[str, Any]:
        """What the extension needs to fill `out`; the floats are those of `patches.normalise_rows`."""
        height, width = self.frame_size
        return {
            "index": self.index,
            "frames": self.frames,
            "deadline_s": deadline_s,
            "height": height,
            "width": width,
            "patch_size": geometry.patch_size,
            "temporal_patch_size": geometry.temporal_patch_size,
            "merge_size": geometry.merge_size,
            "mean": (255 * torch.tensor(geometry.mean)).tolist(),
            "std": (255 * torch.tensor(geometry.std)).tolist(),
            "dtype": str(out.dtype).removeprefix("torch."),
            "out": out.data_ptr(),
            "out_bytes": out.nbytes,
        }

    def result(
        self,
        path: Path,
        patches: Tensor,
        geometry: Geometry,
        states: np.ndarray,
        status: tuple[str, str],
        keep_partial: bool,
    ) -> tuple[Tensor, VideoResult]:
        """The patches of the good frames and their description. Raises VideoError when they are too few to keep."""
        good = states == GOOD
        code, reason = self._verdict(states, status)
        grid = geometry.grid_thw(int(good.sum()), self.frame_size)
        message = ""
        if code != "OK":
            error = VideoError(path, code, f"{good.sum()} of {len(good)} wanted frames are good ({reason})")
            if not keep_partial or good.sum() < FRAME_FACTOR:
                raise error
            message = str(error)
        if not good.all():
            whole = unpatchify(patches, geometry.grid_thw(len(good), self.frame_size), geometry)
            patches = patchify(whole[: len(good)][torch.from_numpy(good)], geometry)
        return patches, VideoResult(
            path=path,
            status="ok" if code == "OK" else "partial",
            code=code,
            message=message,
            num_frames=int(good.sum()),
            frame_times_s=torch.from_numpy(self.times_s[good]),
            grid_thw=grid,
            second_per_grid=geometry.temporal_patch_size * self.second_per_frame,
            begin_s=self.begin_s,
            backend=NAME,
            note=self.note,
        )

    def _verdict(self, states: np.ndarray, status: tuple[str, str]) -> tuple[Code, str]:
        good = states == GOOD
        if status[0] != "OK":
            return cast(Code, status[0]), status[1]
        if not good.any():
            return "DECODE_FAILED", "none could be decoded"
        if not good.all():
            cut_off = self.index.is_truncated or (states[~good] == MISSING).all()
            ends_early = cut_off and not good[good.sum() :].any()
            return (
                ("TRUNCATED", "the rest is missing") if ends_early else ("DAMAGED", "the others are damaged or missing")
            )
        if self.index.is_truncated:
            return "TRUNCATED", self.index.trouble or "the file ends early"
        return "OK", ""


def _plan(
    path: Path,
    sampling: Sampling,
    indexed: tuple[_video.Index | None, tuple[str, str]],
    geometry: Geometry,
    dtype: torch.dtype,
    limits: Limits,
) -> Plan | VideoError:
    index, (code, message) = indexed
    if index is None:
        return VideoError(path, cast(Code, code), message)
    times, duration_s, begin_s = frame_times(index)
    notes = _notes(index)
    if len(times) == 1 and sampling.start_s == 0:
        frames, second_per_frame = np.zeros(FRAME_FACTOR, dtype=np.int64), 1 / sampling.fps
        notes.append(SINGLE_FRAME)
    elif len(times) < FRAME_FACTOR or not 0 < duration_s < math.inf:
        return VideoError(path, "TOO_FEW_FRAMES", f"has {len(times)} frames, at least {FRAME_FACTOR} are needed")
    elif sampling.mode == "pts":
        wanted, second_per_frame = sample_times(sampling, len(times), duration_s)
        frames = frames_on_screen(wanted, times)
    else:
        frames, second_per_frame = sample_indices(sampling, len(times), _frame_rate(index) or len(times) / duration_s)
    if len(frames) < FRAME_FACTOR:
        return VideoError(path, "TOO_FEW_FRAMES", f"gives {len(frames)} frames for {sampling}")
    try:
        frame_size = geometry.frame_size(len(frames), *index.size)
    except ValueError as error:
        return VideoError(path, "BAD_GEOMETRY", str(error))
    plan = Plan(index, frames, times[frames], begin_s, second_per_frame, frame_size, "; ".join(notes))
    patch_bytes = plan.num_patches(geometry) * geometry.row_width * dtype.itemsize
    try:
        limits.check(path, math.prod(index.coded_size), len(times), patch_bytes)
    except VideoError as error:
        return error
    return plan


def _notes(index: _video.Index) -> list[str]:
    """What of the file the result does not show as it stands there."""
    told = {
        f"its rotation by {index.unapplied_degrees} degrees is not applied": index.unapplied_degrees,
        "its times are in decoding order: frames are in order, some a frame early or late": index.has_false_times,
        f"{index.num_left_out} frames are left out: what they refer to is not in the file": index.num_left_out,
        f"its clock starts again {index.num_restarts} times: the parts follow one another": index.num_restarts,
    }
    return [note for note, is_so in told.items() if is_so]


def _frame_rate(index: _video.Index) -> float:
    """As the header gives it; 0 where it counts fields or ticks (AVI) rather than the frames that are there."""
    return index.frame_rate if index.has_times and 0 < index.frame_rate < math.inf else 0.0


def frame_times(index: _video.Index) -> tuple[np.ndarray, float, float]:
    """([n] float64 seconds since the first frame in order of presentation, seconds to the end of the last, begin)."""
    begins, durations = index.clock
    if index.num_frames == 0:
        return np.empty(0), 0.0, 0.0
    if len(begins) == 0:
        step = 1 / (index.frame_rate if 0 < index.frame_rate < math.inf else DEFAULT_FPS)
        return np.arange(index.num_frames) * step, index.num_frames * step, 0.0
    numerator, denominator = index.time_base
    begin, end = int(begins[0]), int(begins[-1] + durations[-1])
    seconds = (begins - begin) * numerator / denominator
    return seconds, (end - begin) * numerator / denominator, begin * numerator / denominator

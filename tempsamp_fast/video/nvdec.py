"""Decoding on a GPU: its hardware decoders fill surfaces, and one kernel makes them patches. What they cannot decode
exactly, the CPU decodes, and the result says why."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast import _video
from tempsamp_fast.video import native
from tempsamp_fast.video.backend import LoadOptions, Request, usable_cores
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.nv12 import Pictures, write_patches
from tempsamp_fast.video.result import Limits, VideoError, VideoResult, failure

NAME = "nvdec"
DECODERS_PER_ENGINE = 2
MOST_DECODERS = 14
"""Open at a time: one for every engine keeps it waiting for packets, more than this many slow each other down."""
SURFACE_BYTES = 2**29
"""Memory for decoded frames at native size, before they become patches."""


def load(
    requests: Sequence[Request],
    geometry: Geometry,
    dtype: torch.dtype,
    options: LoadOptions,
    device: torch.device,
    decoders: _video.Nvdec,
) -> tuple[Tensor, list[VideoResult]]:
    """See `backend.Backend`; `num_threads` hardware decoders at a time, the rows on `device` in its current stream."""
    plans = native.make_plans(requests, geometry, dtype, options)
    sizes = [plan.num_patches(geometry) if isinstance(plan, native.Plan) else 0 for plan in plans]
    rows = torch.empty(sum(sizes), geometry.row_width, dtype=dtype, device=device)
    parts = rows.split(sizes)
    gpu = Gpu(device, decoders, options.num_threads or most_decoders(decoders), options.limits)
    files = {
        index: File.of(plan, part, options.deadline_s)
        for index, (plan, part) in enumerate(zip(plans, parts, strict=True))
        if isinstance(plan, native.Plan)
    }
    gpu.look(list(files.values()), options.num_threads or usable_cores())
    for wave in waves(piece for file in files.values() for piece in file.pieces(geometry)):
        gpu.decode([piece for piece in wave if not piece.file.is_settled], geometry)

    left = [index for index, file in files.items() if file.reason]
    patches, answers = native.decode_plans(
        [requests[index][0] for index in left],
        [files[index].plan for index in left],
        [files[index].deadline_s for index in left],
        geometry,
        dtype,
        options,
    )
    from_cpu = dict(zip(left, zip(_split(patches, answers), answers, strict=True), strict=True))
    kept, results = [], []
    for index, ((path, _), plan, part) in enumerate(zip(requests, plans, parts, strict=True)):
        try:
            if isinstance(plan, VideoError):
                raise plan
            file = files[index]
            if file.reason:
                patches, result = from_cpu[index]
                result = result.decoded_instead_of(NAME, file.reason)
            else:
                patches, result = plan.result(path, part, geometry, file.states, file.status, options.keep_partial)
                result = replace(result, backend=NAME)
        except VideoError as error:
            # Its traceback would keep the rows and the decoders.
            patches, result = rows[:0], failure(error.with_traceback(None), NAME)
        kept.append(part.copy_(patches) if len(patches) == len(part) else patches.to(device))
        results.append(result)
    return (rows if sum(map(len, kept)) == len(rows) else torch.cat(kept)), results


def most_decoders(decoders: _video.Nvdec) -> int:
    """Hardware decoders to keep open at a time."""
    return max(1, min(DECODERS_PER_ENGINE * decoders.num_engines, MOST_DECODERS))


@dataclass
class File:
    """One planned file on its way through the hardware decoders."""

    plan: native.Plan
    rows: Tensor
    """Where its patches go."""
    deadline_s: float
    """What is left of it."""
    states: np.ndarray
    """[n] uint8, one per wanted frame, as `_video.decode` gives them."""
    bit_depth: int = 8
    pictures: Pictures = field(default_factory=lambda: Pictures(0, 0, (0, 0, 0, 0, 0, 0)))
    status: tuple[str, str] = ("OK", "")
    reason: str = ""
    """Why the CPU has to decode it."""

    @staticmethod
    def of(plan: native.Plan, rows: Tensor, deadline_s: float) -> File:
        states = np.full(len(plan.frames), native.MISSING, dtype=np.uint8)
        return File(plan, rows, max(deadline_s - plan.index.read_s, 0.0), states)

    @property
    def is_settled(self) -> bool:
        """Whether the hardware decoders have no more to do with it."""
        return bool(self.reason) or self.status[0] != "OK"

    @property
    def surface_dtype(self) -> torch.dtype:
        return torch.uint16 if self.bit_depth > 8 else torch.uint8

    def note(self, status: tuple[str, str], seconds: float) -> None:
        """What became of it, or of a part of it; all but a deadline is left to the CPU.

        seconds: its equal share of a call for many files, whose own times are not known: the neighbours of a file
            cannot use up its deadline, and one that is slower than they are gets more time over several calls.
        """
        self.deadline_s = max(self.deadline_s - seconds, 0.0)
        if status[0] == "DEADLINE":
            self.status = status
        elif status[0] != "OK":
            self.reason = status[1]

    def pieces(self, geometry: Geometry) -> Iterator[Piece]:
        """All of it, unless it has to be decoded by the CPU, in parts whose surfaces fit into `SURFACE_BYTES`."""
        if self.is_settled:
            return
        rows, columns = self.pictures.surface_shape
        per_patch = geometry.temporal_patch_size * rows * columns * self.surface_dtype.itemsize
        most = max(SURFACE_BYTES // per_patch, 1) * geometry.temporal_patch_size
        for first in range(0, len(self.plan.frames), most):
            last = min(first + most, len(self.plan.frames))
            yield Piece(self, first, last, (last - first) * per_patch // geometry.temporal_patch_size)


@dataclass(frozen=True)
class Piece:
    """Wanted frames [first, last) of one file, beginning with a temporal patch."""

    file: File
    first: int
    last: int
    num_bytes: int
    """Of their surfaces."""

    def rows(self, geometry: Geometry) -> Tensor:
        """Where its patches go."""
        _, grid_h, grid_w = geometry.grid_thw(self.last - self.first, self.file.plan.frame_size)
        first = self.first // geometry.temporal_patch_size
        last = -(-self.last // geometry.temporal_patch_size)
        return self.file.rows[first * grid_h * grid_w : last * grid_h * grid_w]


def waves(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """What is decoded at the same time: as many pieces as fit into `SURFACE_BYTES`, at least one."""
    wave: list[Piece] = []
    for piece in pieces:
        if wave and sum(each.num_bytes for each in [*wave, piece]) > SURFACE_BYTES:
            yield wave
            wave = []
        wave.append(piece)
    if wave:
        yield wave


@dataclass(frozen=True)
class Gpu:
    """A device, its decoders, and how many of them to use at a time."""

    device: torch.device
    decoders: _video.Nvdec
    num_decoders: int
    limits: Limits

    def look(self, files: Sequence[File], num_threads: int) -> None:
        """Find out what the pictures of the files are, and which files the GPU does not decode."""
        started = time.monotonic()
        answers = self.decoders.look(
            [file.plan.index for file in files],
            [file.deadline_s for file in files],
            max_frame_pixels=self.limits.max_frame_pixels,
            num_threads=num_threads,
        )
        seconds = time.monotonic() - started
        for file, (status, bit_depth, coefficients) in zip(files, answers, strict=True):
            index = file.plan.index
            file.note(status, seconds / len(files))
            file.bit_depth = bit_depth
            file.pictures = Pictures(*index.coded_size, coefficients, index.orientation)

    def decode(self, wave: Sequence[Piece], geometry: Geometry) -> None:
        """Write the patches of every piece whose frames all come out."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            started = time.monotonic()
            chosen = [
                np.unique(piece.file.plan.frames[piece.first : piece.last], return_inverse=True) for piece in wave
            ]
            surfaces = [
                torch.empty(
                    len(frames), *piece.file.pictures.surface_shape, dtype=piece.file.surface_dtype, device=self.device
                )
                for piece, (frames, _) in zip(wave, chosen, strict=True)
            ]
            answers = self.decoders.decode(
                [
                    {
                        "index": piece.file.plan.index,
                        "frames": frames.tolist(),
                        "bit_depth": piece.file.bit_depth,
                        "deadline_s": piece.file.deadline_s,
                        "out": surface.data_ptr(),
                        "out_bytes": surface.nbytes,
                    }
                    for piece, (frames, _), surface in zip(wave, chosen, surfaces, strict=True)
                ],
                stream=torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0,
                max_frame_pixels=self.limits.max_frame_pixels,
                num_threads=self.num_decoders,
            )
            seconds = time.monotonic() - started
            for piece, (_, places), surface, (states, status, _) in zip(wave, chosen, surfaces, answers, strict=True):
                file = piece.file
                file.note(status, seconds / len(wave))
                file.states[piece.first : piece.last] = states[places]
                if status[0] == "OK" and (states != native.GOOD).any():
                    file.reason = f"{(states != native.GOOD).sum()} frames did not come out whole"
                if not file.reason:
                    write_patches(
                        surface, file.pictures, places.tolist(), geometry, file.plan.frame_size, piece.rows(geometry)
                    )


def _split(rows: Tensor, results: Sequence[VideoResult]) -> Sequence[Tensor]:
    """The rows of each result; none for a failed one."""
    return rows.split([result.num_patches for result in results])

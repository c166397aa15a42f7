"""What loading videos gives back: packed patches, one status per request, and the error that names the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tempsamp_fast.batch import VideoPatches

Status = Literal["ok", "partial", "failed"]
"""`partial`: some wanted frames are missing or damaged, and the result holds the good ones."""

Code = Literal[
    "OK",
    "NOT_FOUND",
    "OPEN_FAILED",
    "NO_VIDEO_STREAM",
    "TOO_FEW_FRAMES",
    "BAD_GEOMETRY",
    "UNSUPPORTED",
    "TRUNCATED",
    "DAMAGED",
    "DECODE_FAILED",
    "LIMIT_EXCEEDED",
    "DEADLINE",
]
"""Why a video is not `ok`. `TRUNCATED`: the good frames end early; `DAMAGED`: some are missing in between;
`UNSUPPORTED`: the file may be good, but this backend cannot tell its frames apart."""


SINGLE_FRAME = "has a single frame: it is repeated"


def printable(path: Path) -> str:
    """A path as text that any stream can write, also where its bytes are no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


class VideoError(ValueError):
    """A video that cannot be used; the message names the file and `code` says why."""

    def __init__(self, path: Path, code: Code, reason: str):
        super().__init__(f"{printable(path)}: {reason} [{code}]")
        self.path = path
        self.code = code


@dataclass(frozen=True)
class Limits:
    """What one file may cost before it is refused with `LIMIT_EXCEEDED`: the guard against decompression bombs."""

    max_frame_pixels: int = 2**25
    """Width times height of a coded frame; the default admits 8K (7680 x 4320)."""
    max_num_frames: int = 2_000_000
    """Frames in the file."""
    max_patch_bytes: int = 4 * 2**30
    """Bytes of patches made from one video."""

    def check(self, path: Path, frame_pixels: int, num_frames: int, patch_bytes: int) -> None:
        """Raise VideoError with `LIMIT_EXCEEDED` for the first figure that is over its limit."""
        figures = {
            "max_frame_pixels": frame_pixels,
            "max_num_frames": num_frames,
            "max_patch_bytes": patch_bytes,
        }
        for name, figure in figures.items():
            if figure > getattr(self, name):
                raise VideoError(path, "LIMIT_EXCEEDED", f"{figure} is over {name} = {getattr(self, name)}")


@dataclass(frozen=True)
class VideoResult:
    """What became of one request. Every time is in seconds since the first frame of the video."""

    path: Path
    status: Status
    code: Code
    message: str = ""
    """Empty when `ok`; otherwise names the file and the reason."""
    num_frames: int = 0
    """Good frames in the patches, without the repeated last one that makes their number even."""
    frame_times_s: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """[num_frames] float64: true presentation times of the frames that were taken."""
    grid_thw: tuple[int, int, int] = (0, 0, 0)
    """Patches along time, height and width, before spatial merging."""
    second_per_grid: float = 0.0
    """Seconds between two neighbours along the time axis of the grid: `temporal_patch_size` / sampled fps."""
    begin_s: float = 0.0
    """Time stamp of the first frame in the container's own clock."""
    backend: str = ""
    """What decoded it, with the reason where it was not the first choice."""
    note: str = ""
    """What was done with a good file that its user should know: a single frame repeated, a rotation not applied."""

    @property
    def num_patches(self) -> int:
        """Rows of this video in the packed patches."""
        grid_t, grid_h, grid_w = self.grid_thw
        return grid_t * grid_h * grid_w

    def timestamps_s(self, temporal_patch_size: int = 2) -> Tensor:
        """[grid_t] float64: mean of the first and last frame time of each temporal patch, as Qwen3-VL writes it."""
        padding = self.frame_times_s[-1:].expand(-self.num_frames % temporal_patch_size)
        pairs = torch.cat([self.frame_times_s, padding]).view(-1, temporal_patch_size)
        return (pairs[:, 0] + pairs[:, -1]) / 2

    def decoded_instead_of(self, engine: str, reason: str) -> VideoResult:
        """The same, `backend` saying why another one was not used."""
        return replace(self, backend=f"{self.backend} (not {engine}: {reason})")

    def error(self) -> VideoError:
        """This failure as an exception."""
        reason = self.message.removeprefix(f"{printable(self.path)}: ").removesuffix(f" [{self.code}]")
        return VideoError(self.path, self.code, reason)


def failure(error: VideoError, backend: str) -> VideoResult:
    """The result of a request that gave nothing."""
    return VideoResult(error.path, "failed", error.code, str(error), backend=backend)


@dataclass(frozen=True)
class VideoBatch:
    """The videos that were loaded, packed for the model, and the results of all requests.

    Failed requests have a result and no rows: `video_grid_thw` and the fields beside it count loaded videos only,
    in the order of the requests, so that they can be handed to the model as they are.
    """

    pixel_values: Tensor
    """[num_patches, row_width] float32, bfloat16 (normalised) or uint8 (0..255)."""
    video_grid_thw: Tensor
    """[V, 3] int64."""
    second_per_grid: Tensor
    """[V] float32."""
    timestamps_s: list[Tensor]
    """V tensors of [grid_t] float64."""
    results: list[VideoResult]
    """One per request."""

    @staticmethod
    def pack(pixel_values: Tensor, results: Sequence[VideoResult], temporal_patch_size: int) -> VideoBatch:
        """Describe `pixel_values`, which holds the rows of all loaded videos of `results` in order."""
        loaded = [result for result in results if result.status != "failed"]
        assert sum(result.num_patches for result in loaded) == len(pixel_values)
        return VideoBatch(
            pixel_values,
            torch.tensor([result.grid_thw for result in loaded], dtype=torch.int64).view(-1, 3),
            torch.tensor([result.second_per_grid for result in loaded], dtype=torch.float32),
            [result.timestamps_s(temporal_patch_size) for result in loaded],
            list(results),
        )

    def split(self) -> list[VideoPatches | None]:
        """One entry per request, None where it failed; the patches are views."""
        rows = iter(self.pixel_values.split([int(grid.prod()) for grid in self.video_grid_thw]))
        times = iter(self.timestamps_s)
        return [
            None
            if result.status == "failed"
            else VideoPatches(next(rows), result.grid_thw, result.second_per_grid, next(times))
            for result in self.results
        ]

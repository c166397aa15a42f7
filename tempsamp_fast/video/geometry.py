"""How large a frame becomes and how patches are laid out: the arithmetic of the two model families' processors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

Processor = Literal["qwen2_5_vl", "qwen3_vl"]
"""Whose rule: frames bounded one by one, or all together. `model.families` says which family has which."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT = 200


@dataclass(frozen=True)
class Geometry:
    """From frame size to patch grid, for one model. The defaults are the paper's Qwen2.5-VL run."""

    family: Processor = "qwen2_5_vl"
    patch_size: int = 14
    """Pixels along one side of a patch."""
    temporal_patch_size: int = 2
    """Frames in a patch."""
    merge_size: int = 2
    """Patches along one side of a block that the vision tower merges into one token."""
    min_pixels: int = 16 * 28 * 28
    """Least pixels: of a frame in qwen2_5_vl, of all frames together in qwen3_vl."""
    max_pixels: int | None = 768 * 28 * 28
    """Most pixels of a frame; None only in qwen3_vl: nothing but `total_pixels` bounds a frame."""
    total_pixels: int | None = 3584 * 28 * 28
    """Budget of a video. qwen2_5_vl: per temporal patch of two frames, as qwen-vl-utils shares it out, None for no
    budget (the processor of transformers). qwen3_vl: over all frames."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.family not in get_args(Processor):
            raise ValueError(f"family must be one of {get_args(Processor)}, got {self.family!r}")
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.family == "qwen2_5_vl" and self.max_pixels is None:
            raise ValueError("max_pixels must be given for qwen2_5_vl, got None")
        if self.family == "qwen3_vl" and self.total_pixels is None:
            raise ValueError("total_pixels must be given for qwen3_vl, got None")
        for name in ("max_pixels", "total_pixels"):
            bound = getattr(self, name)
            if bound is not None and bound < self.min_pixels:
                raise ValueError(f"{name} must be at least min_pixels ({self.min_pixels}), got {bound}")

    @staticmethod
    def of_family(family: Processor, **overrides: Any) -> Geometry:
        """The published settings of a family (paper: Qwen2.5-VL; public release: Qwen3-VL), with fields replaced."""
        if family == "qwen3_vl":
            half = (0.5, 0.5, 0.5)
            settings: dict[str, Any] = {
                "patch_size": 16,
                "min_pixels": 4 * 32 * 32,
                "max_pixels": None,
                "total_pixels": 14336 * 32 * 32,
                "mean": half,
                "std": half,
            }
        else:
            settings = {}
        return Geometry(family=family, **{**settings, **overrides})

    @property
    def factor(self) -> int:
        """Pixels along one side of a merged block; frame sides are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def counts_every_frame(self) -> bool:
        """Whether `total_pixels` counts both frames of a temporal patch, which qwen-vl-utils counts as one."""
        return self.family == "qwen3_vl"

    @property
    def row_width(self) -> int:
        """Values in one patch row: channels * frames * height * width."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def frame_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) that frames of (height, width) are resized to when `num_frames` of them are sampled.

        Raises ValueError for an aspect ratio over 200 and, in qwen3_vl, for fewer frames than a temporal patch.
        """
        if self.family == "qwen2_5_vl":
            return smart_resize(height, width, self.factor, self.min_pixels, self._frame_budget(num_frames))
        return smart_resize_video(
            num_frames,
            height,
            width,
            self.factor,
            self.min_pixels,
            self._video_budget(num_frames),
            self.temporal_patch_size,
        )

    def grid_thw(self, num_frames: int, frame_size: tuple[int, int]) -> tuple[int, int, int]:
        """Patches along time, height and width for `num_frames` frames already resized to `frame_size`."""
        height, width = frame_size
        return -(-num_frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def _frame_budget(self, num_frames: int) -> float:
        assert self.max_pixels is not None
        if self.total_pixels is None:
            return self.max_pixels
        share = self.total_pixels / num_frames * self.temporal_patch_size
        return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))

    def _video_budget(self, num_frames: int) -> int:
        assert self.total_pixels is not None
        if self.max_pixels is None:
            return self.total_pixels
        per_frame = max(min(self.max_pixels, self.total_pixels // num_frames), int(self.min_pixels * 1.05))
        return per_frame * num_frames


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """Qwen2.5-VL: the (height, width) of one frame, multiples of `factor` within the bounds, aspect nearly kept.

    Rounds half to even, as Python does and transformers relies on. Raises ValueError for an aspect ratio over 200.
    """
    _check_aspect(height, width)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > max_pixels:
        return _shrunk(height, width, factor, math.sqrt(height * width / max_pixels))
    if new_height * new_width < min_pixels:
        return _grown(height, width, factor, math.sqrt(min_pixels / (height * width)))
    return new_height, new_width


def smart_resize_video(
    num_frames: int, height: int, width: int, factor: int, min_pixels: int, max_pixels: int, temporal_factor: int = 2
) -> tuple[int, int]:
    """Qwen3-VL: the (height, width) of every frame, the bounds holding for all frames together.

    The comparison uses the number of frames rounded to `temporal_factor`, the scale the raw number, as transformers
    does. Raises ValueError for an aspect ratio over 200 or too few frames.
    """
    if num_frames < temporal_factor:
        raise ValueError(f"num_frames must be at least {temporal_factor}, got {num_frames}")
    if height < factor or width < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    volume = round(num_frames / temporal_factor) * temporal_factor * new_height * new_width
    if volume > max_pixels:
        return _shrunk(height, width, factor, math.sqrt(num_frames * height * width / max_pixels))
    if volume < min_pixels:
        return _grown(height, width, factor, math.sqrt(min_pixels / (num_frames * height * width)))
    return new_height, new_width


def _shrunk(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    return (
        max(factor, math.floor(height / beta / factor) * factor),
        max(factor, math.floor(width / beta / factor) * factor),
    )


def _grown(height: int, width: int, factor: int, beta: float) -> tuple[int, int]:
    return math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor


def _check_aspect(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} x {width}")
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ValueError(f"aspect ratio must not be over {MAX_ASPECT}, got {aspect:.1f} ({height} x {width})")

"""Frames to patch rows in torch: the reference that every backend matches bit for bit."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from tempsamp_fast.video.geometry import Geometry

PATCH_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def resize_frames(frames: Tensor, frame_size: tuple[int, int]) -> Tensor:
    """[T, 3, H, W] uint8 -> [T, 3, *frame_size] uint8: antialiased bicubic (a = -0.5), horizontal pass first."""
    if frames.shape[-2:] == frame_size:
        return frames
    return F.interpolate(frames, frame_size, mode="bicubic", antialias=True)


def patchify(frames: Tensor, geometry: Geometry) -> Tensor:
    """[T, 3, H, W] already resized -> [gt * gh * gw, row_width], rows grouped by merged block; same dtype.

    T is padded to whole temporal patches by repeating the last frame.
    """
    padding = -len(frames) % geometry.temporal_patch_size
    frames = torch.cat([frames, frames[-1:].expand(padding, -1, -1, -1)]) if padding else frames
    ps, merge = geometry.patch_size, geometry.merge_size
    _, channels, height, width = frames.shape
    blocks = frames.reshape(
        -1, geometry.temporal_patch_size, channels, height // ps // merge, merge, ps, width // ps // merge, merge, ps
    )
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, geometry.row_width)


def unpatchify(rows: Tensor, grid_thw: tuple[int, int, int], geometry: Geometry) -> Tensor:
    """Inverse of `patchify`: [gt * gh * gw, row_width] -> [gt * temporal_patch_size, 3, H, W]."""
    grid_t, grid_h, grid_w = grid_thw
    ps, merge = geometry.patch_size, geometry.merge_size
    blocks = rows.view(
        grid_t, grid_h // merge, grid_w // merge, merge, merge, 3, geometry.temporal_patch_size, ps, ps
    ).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return blocks.reshape(grid_t * geometry.temporal_patch_size, 3, grid_h * ps, grid_w * ps)


def normalise_rows(rows: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 patch rows [n, row_width] -> `dtype`: (x - 255 * mean) / (255 * std) per channel, in float32, then rounded.

    Works on any device, so that patches can be kept and moved as uint8. `dtype` uint8 returns `rows` themselves.
    """
    if dtype not in PATCH_DTYPES:
        raise ValueError(f"dtype must be one of {PATCH_DTYPES}, got {dtype}")
    if dtype == torch.uint8:
        return rows
    mean, std = _mean_and_std(geometry, rows.device)
    values = rows.view(len(rows), 3, -1).float()
    return values.sub_(mean).div_(std).view_as(rows).to(dtype)


@cache
def _mean_and_std(geometry: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """[3, 1] each, of values from 0 to 255; made once, since sending them waits for the device."""
    mean, std = (255 * torch.tensor(values).view(3, 1).to(device) for values in (geometry.mean, geometry.std))
    return mean, std

"""Decoder surfaces (NV12, P016) to patch rows in one Triton kernel: colour, resize, normalise, patch order.

8-bit surfaces give the bits of the CPU path (`patches`); P016 keeps the extra bits until the colour conversion rounds.
Where there are surfaces it needs Triton, and a GPU unless TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tempsamp_kernels.optional_triton import tl, triton
from torch import Tensor

from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.patches import normalise_rows

TILE = 32
"""Output pixels along each side of what one program makes."""


@dataclass(frozen=True)
class Pictures:
    """What the surfaces of a file hold."""

    height: int
    """Rows as coded; as shown where the orientation does not transpose."""
    width: int
    coefficients: tuple[int, int, int, int, int, int]
    """(luma offset, luma, red of v, green of u, green of v, blue of u) in swscale's fixed point."""
    orientation: tuple[bool, bool, bool] = (False, False, False)
    """(transpose, mirror x, mirror y): how a picture is turned for display, in this order."""

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) as displayed."""
        return (self.width, self.height) if self.orientation[0] else (self.height, self.width)

    @property
    def surface_shape(self) -> tuple[int, int]:
        """(rows, samples per row) of the smallest surface that holds one."""
        return (self.height + 1) // 2 * 3, (self.width + 1) // 2 * 2


def write_patches(
    surfaces: Tensor,
    pictures: Pictures,
    frames: Sequence[int],
    geometry: Geometry,
    frame_size: tuple[int, int],
    out: Tensor,
) -> None:
    """Fill `out` with the patch rows of frames of one video, on the device of `surfaces` and its current stream.

    Args:
        surfaces: [S, rows, pitch] uint8 (NV12) or uint16 (P016), contiguous; luma in the first `height` rows,
            interleaved chroma from row `height` rounded up to even.
        frames: n numbers of surfaces, in the order of the patches; an odd n is padded by the last.
        frame_size: (height, width) to resize to, from `geometry.frame_size`.
        out: [gt * gh * gw, row_width] float32, bfloat16 (normalised) or uint8, contiguous.

    Raises ValueError for surfaces that are too small or of another dtype, and for another shape of `out`.
    """
    _, rows, pitch = surfaces.shape
    least_rows, least_pitch = pictures.surface_shape
    if surfaces.dtype not in (torch.uint8, torch.uint16) or not surfaces.is_contiguous():
        raise ValueError(f"surfaces must be contiguous uint8 or uint16, got {surfaces.dtype}")
    if pitch < least_pitch or rows < least_rows:
        size = f"{pictures.height} x {pictures.width}"
        raise ValueError(f"surfaces of {rows} x {pitch} cannot hold frames of {size}")
    grid_t, grid_h, grid_w = geometry.grid_thw(len(frames), frame_size)
    if out.shape != (grid_t * grid_h * grid_w, geometry.row_width) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous [{grid_t * grid_h * grid_w}, {geometry.row_width}], got {list(out.shape)}"
        )
    num_frames = grid_t * geometry.temporal_patch_size
    padded = [*frames, *[frames[-1]] * (num_frames - len(frames))]
    (height, width), (out_height, out_width) = pictures.shown_size, frame_size
    transpose, mirror_x, mirror_y = pictures.orientation
    horizontal = _resize_taps(width, out_width, surfaces.device)
    vertical = _resize_taps(height, out_height, surfaces.device)
    tiles = triton.cdiv(out_height, TILE), triton.cdiv(out_width, TILE)
    _surface_kernel[(num_frames, *tiles)](
        surfaces,
        torch.tensor(padded, dtype=torch.int32).to(surfaces.device),
        out,
        _pixel_table(geometry, out.dtype, surfaces.device),
        horizontal.first,
        horizontal.weights,
        vertical.first,
        vertical.weights,
        horizontal.precision,
        vertical.precision,
        rows * pitch,
        pitch,
        pictures.height + pictures.height % 2,
        height,
        width,
        out_height,
        out_width,
        *pictures.coefficients,
        TAPS_X=horizontal.weights.shape[1],
        TAPS_Y=vertical.weights.shape[1],
        TRANSPOSE=transpose,
        MIRROR_X=mirror_x,
        MIRROR_Y=mirror_y,
        IS_16_BIT=surfaces.dtype == torch.uint16,
        PATCH=geometry.patch_size,
        MERGE=geometry.merge_size,
        TEMPORAL=geometry.temporal_patch_size,
        TILE=TILE,
    )


@dataclass(frozen=True)
class Taps:
    """One pass of the integer bicubic resize."""

    first: Tensor
    """[out] int32: first input of each output."""
    weights: Tensor
    """[out, taps] int32 fixed point, zero after the last tap."""
    precision: int
    """Fractional bits of the weights."""


@lru_cache(maxsize=64)
def _resize_taps(source: int, target: int, device: torch.device) -> Taps:
    """Antialiased bicubic (a = -0.5) in fixed point, as torch's uint8 kernel on the CPU rounds it."""
    scale = source / target
    stretch = max(scale, 1.0)
    centres = scale * (np.arange(target) + 0.5)
    first = np.maximum((centres - 2 * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + 2 * stretch + 0.5).astype(np.int64), source)
    inputs = first[:, None] + np.arange((last - first).max())
    x = np.abs((inputs - centres[:, None] + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    exact = np.where(inputs < last[:, None], np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    exact /= exact.sum(axis=1, keepdims=True)
    precision = max(bits for bits in range(23) if int(0.5 + exact.max() * (1 << bits)) < 1 << 15)
    weights = np.trunc(exact * (1 << precision) + np.copysign(0.5, exact)).astype(np.int32)
    return Taps(torch.from_numpy(first.astype(np.int32)).to(device), torch.from_numpy(weights).to(device), precision)


@lru_cache(maxsize=8)
def _pixel_table(geometry: Geometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3, 256]: what each pixel value becomes, by the arithmetic of `normalise_rows` on the CPU."""
    values = torch.arange(256, dtype=torch.uint8).repeat(3)[None]
    return normalise_rows(values, geometry, dtype).view(3, 256).to(device)


@triton.jit
def _surface_kernel(
    surface_ptr,
    frame_ptr,
    out_ptr,
    table_ptr,
    first_x_ptr,
    weights_x_ptr,
    first_y_ptr,
    weights_y_ptr,
    precision_x,
    precision_y,
    frame_stride,
    pitch,
    chroma_row,
    height,
    width,
    out_height,
    out_width,
    luma_offset,
    luma_scale,
    red_v,
    green_u,
    green_v,
    blue_u,
    TAPS_X: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    MIRROR_X: tl.constexpr,
    MIRROR_Y: tl.constexpr,
    IS_16_BIT: tl.constexpr,
    PATCH: tl.constexpr,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """One TILE x TILE piece of one output frame: every row of its window, as shown, is converted and resized along x,
    rounded to 8 bits, and added to the output rows that it has a weight in."""
    frame = tl.program_id(0)
    source_ptr = surface_ptr + tl.load(frame_ptr + frame).to(tl.int64) * frame_stride
    y = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.program_id(2) * TILE + tl.arange(0, TILE)
    y_inside, x_inside = y < out_height, x < out_width
    first_y = tl.load(first_y_ptr + y, mask=y_inside, other=height)
    first_x = tl.load(first_x_ptr + x, mask=x_inside, other=width)
    begin = tl.min(first_y)
    end = tl.minimum(tl.max(tl.where(y_inside, first_y, 0)) + TAPS_Y, height)

    red = tl.zeros((TILE, TILE), dtype=tl.int32)
    green = tl.zeros((TILE, TILE), dtype=tl.int32)
    blue = tl.zeros((TILE, TILE), dtype=tl.int32)
    for row in range(begin, end):
        turned_row = height - 1 - row if MIRROR_Y else row
        row_red = tl.zeros((TILE,), dtype=tl.int32)
        row_green = tl.zeros((TILE,), dtype=tl.int32)
        row_blue = tl.zeros((TILE,), dtype=tl.int32)
        for tap in range(TAPS_X):
            column = first_x + tap
            inside = column < width
            weight = tl.load(weights_x_ptr + x * TAPS_X + tap, mask=x_inside, other=0)
            turned_column = width - 1 - column if MIRROR_X else column
            source_row = turned_column if TRANSPOSE else turned_row
            source_column = turned_row if TRANSPOSE else turned_column
            luma_ptr = source_ptr + source_row * pitch + source_column
            chroma_ptr = source_ptr + (chroma_row + source_row // 2) * pitch + source_column // 2 * 2
            luma = _sample(luma_ptr, inside, IS_16_BIT) - luma_offset
            u = _sample(chroma_ptr, inside, IS_16_BIT) - 1024
            v = _sample(chroma_ptr + 1, inside, IS_16_BIT) - 1024
            grey = (luma * luma_scale) >> 16
            row_red += weight * _clip(grey + ((v * red_v) >> 16))
            row_green += weight * _clip(grey + ((u * green_u) >> 16) + ((v * green_v) >> 16))
            row_blue += weight * _clip(grey + ((u * blue_u) >> 16))
        tap_y = row - first_y
        has_weight = y_inside & (tap_y >= 0) & (tap_y < TAPS_Y)
        weight_y = tl.load(weights_y_ptr + y * TAPS_Y + tap_y, mask=has_weight, other=0)[:, None]
        red += weight_y * _rounded(row_red, precision_x)[None, :]
        green += weight_y * _rounded(row_green, precision_x)[None, :]
        blue += weight_y * _rounded(row_blue, precision_x)[None, :]

    block: tl.constexpr = PATCH * MERGE
    blocks_down, blocks_across = out_height // block, out_width // block
    patch_row = ((frame // TEMPORAL) * blocks_down + y // block)[:, None] * blocks_across + (x // block)[None, :]
    patch_row = (patch_row * MERGE + (y // PATCH % MERGE)[:, None]) * MERGE + (x // PATCH % MERGE)[None, :]
    area: tl.constexpr = PATCH * PATCH
    within = frame % TEMPORAL * area + (y % PATCH * PATCH)[:, None] + (x % PATCH)[None, :]
    target = out_ptr + patch_row.to(tl.int64) * (3 * TEMPORAL * area) + within
    inside = y_inside[:, None] & x_inside[None, :]
    tl.store(target, tl.load(table_ptr + _rounded(red, precision_y)), mask=inside)
    tl.store(target + TEMPORAL * area, tl.load(table_ptr + 256 + _rounded(green, precision_y)), mask=inside)
    tl.store(target + 2 * TEMPORAL * area, tl.load(table_ptr + 512 + _rounded(blue, precision_y)), mask=inside)


@triton.jit
def _sample(pointer, inside, IS_16_BIT: tl.constexpr):
    """Eight times the 8-bit sample; 16-bit samples keep three bits more."""
    value = tl.load(pointer, mask=inside, other=0).to(tl.int32)
    return value >> 5 if IS_16_BIT else value << 3


@triton.jit
def _clip(value):
    return tl.minimum(tl.maximum(value, 0), 255)


@triton.jit
def _rounded(total, precision):
    """A weighted sum back to 0..255."""
    return _clip((total + (1 << (precision - 1))) >> precision)

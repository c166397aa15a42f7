"""The surface kernel against the CPU path, bit for bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tempsamp_fast.video import Geometry, normalise_rows
from tempsamp_fast.video.nv12 import Pictures, write_patches
from tempsamp_fast.video.patches import patchify, resize_frames

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Geometry(patch_size=4, min_pixels=64, total_pixels=None)
INVERSE_COEFFICIENTS = {
    "bt601": (104597, 132201, 25675, 53279),
    "bt709": (117489, 138438, 13975, 34925),
    "bt2020": (110013, 140363, 12277, 42626),
}
"""(red of v, blue of u, green of u, green of v), times 65536, limited range: the tables of swscale."""


def coefficients(matrix: str = "bt601", full_range: bool = False) -> tuple[int, int, int, int, int, int]:
    """The specification's closed form; the extension makes the same from what a stream says of itself."""
    red_v, blue_u, green_u, green_v = [c * 224 // 255 if full_range else c for c in INVERSE_COEFFICIENTS[matrix]]
    luma = 65536 if full_range else 65536 * 255 // 219
    fixed = [((value << 13) + 32768) >> 16 for value in (luma, red_v, -green_u, -green_v, blue_u)]
    return (0 if full_range else 128, *fixed)  # type: ignore[return-value]


def random_surfaces(num_frames: int, height: int, width: int, pitch: int) -> Tensor:
    rows = (height + height % 2) * 3 // 2
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 256, (num_frames, rows, pitch), dtype=torch.uint8, generator=generator)


def rgb(surfaces: Tensor, pictures: Pictures) -> Tensor:
    """[T, 3, *shown size] uint8: swscale's integer conversion in whole planes, nearest chroma; then turned.

    Of eight times the 8-bit samples, and of 16-bit ones with three bits more than eight.
    """
    height, width = pictures.height, pictures.width
    offset, luma_scale, red_v, green_u, green_v, blue_u = pictures.coefficients
    is_wide = surfaces.dtype == torch.uint16
    planes = torch.from_numpy(surfaces.numpy().astype(np.int32) >> 5) if is_wide else surfaces.to(torch.int32) << 3
    luma = ((planes[:, :height, :width] - offset) * luma_scale) >> 16
    chroma = planes[:, height + height % 2 :].repeat_interleave(2, dim=1)[:, :height]
    u = chroma[:, :, 0::2].repeat_interleave(2, dim=2)[..., :width] - 1024
    v = chroma[:, :, 1::2].repeat_interleave(2, dim=2)[..., :width] - 1024
    red = luma + (v * red_v >> 16)
    green = luma + (u * green_u >> 16) + (v * green_v >> 16)
    blue = luma + (u * blue_u >> 16)
    planes = torch.stack([red, green, blue], dim=1).clamp(0, 255).to(torch.uint8)
    transpose, mirror_x, mirror_y = pictures.orientation
    planes = planes.transpose(2, 3) if transpose else planes
    return planes.flip([axis for axis, is_mirrored in ((3, mirror_x), (2, mirror_y)) if is_mirrored])


def write_patches_in_torch(
    surfaces: Tensor,
    pictures: Pictures,
    frames: Sequence[int],
    geometry: Geometry,
    frame_size: tuple[int, int],
    out: Tensor,
) -> None:
    """What `write_patches` does, by the CPU path; 16-bit samples lose their low bits."""
    wide = surfaces.dtype == torch.uint16
    narrow = torch.from_numpy((surfaces.numpy() >> 8).astype(np.uint8)) if wide else surfaces
    rows = patchify(resize_frames(rgb(narrow, pictures)[list(frames)].contiguous(), frame_size), geometry)
    out.copy_(normalise_rows(rows, geometry, out.dtype))


def patches(surfaces: Tensor, pictures: Pictures, frames: Sequence[int], frame_size: tuple[int, int], dtype) -> Tensor:
    """The kernel's."""
    grid = SMALL.grid_thw(len(frames), frame_size)
    out = torch.empty(grid[0] * grid[1] * grid[2], SMALL.row_width, dtype=dtype, device=DEVICE)
    write_patches(surfaces.to(DEVICE), pictures, frames, SMALL, frame_size, out)
    return out.cpu()


def both_paths(
    surfaces: Tensor, pictures: Pictures, frame_size: tuple[int, int], dtype=torch.uint8, frames: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(ours, the CPU path's)."""
    frames = frames or range(len(surfaces))
    ours = patches(surfaces, pictures, frames, frame_size, dtype)
    expected = torch.empty_like(ours)
    write_patches_in_torch(surfaces, pictures, frames, SMALL, frame_size, expected)
    return ours, expected


@pytest.mark.parametrize(
    "size, frame_size",
    [
        ((12, 22), (8, 16)),
        *(pytest.param(s, f, marks=pytest.mark.slow) for s, f in [((6, 10), (8, 40)), ((8, 16), (8, 16))]),
    ],
)
def test_kernel_gives_the_bits_of_the_cpu_path(size: tuple[int, int], frame_size: tuple[int, int]) -> None:
    """Down, up over two tiles, and unchanged; three frames, so that the last is repeated."""
    ours, expected = both_paths(random_surfaces(3, *size, pitch=64), Pictures(*size, coefficients()), frame_size)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "orientation", [(True, True, False), (False, True, True), (True, False, True), (False, True, False)]
)
def test_turned_and_mirrored_pictures_are_those_of_the_cpu_path(orientation: tuple[bool, bool, bool]) -> None:
    pictures = Pictures(6, 11, coefficients(), orientation)
    ours, expected = both_paths(random_surfaces(1, 6, 11, pitch=16), pictures, (8, 8))
    assert torch.equal(ours, expected)


def test_a_surface_serves_as_often_as_it_is_asked_for() -> None:
    pictures = Pictures(8, 8, coefficients())
    ours, expected = both_paths(random_surfaces(2, 8, 8, pitch=8), pictures, (8, 8), frames=[1, 0, 1])
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_of_every_matrix_and_range_are_those_of_the_cpu_path(matrix, full_range: bool) -> None:
    pictures = Pictures(8, 8, coefficients(matrix, full_range))
    ours, expected = both_paths(random_surfaces(2, 8, 8, pitch=16), pictures, (8, 8))
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_rows_are_those_of_the_cpu_path(dtype: torch.dtype) -> None:
    pictures = Pictures(8, 8, coefficients())
    ours, expected = both_paths(random_surfaces(2, 8, 8, pitch=16), pictures, (8, 8), dtype)
    assert torch.equal(ours, expected)


def test_sixteen_bit_surfaces_are_rounded_by_the_conversion_alone() -> None:
    """Pictures of eight-bit values are the same, those of ten bits are not cut to eight before."""
    narrow = random_surfaces(1, 8, 16, pitch=16)
    low_bits = np.random.default_rng(0).integers(0, 256, narrow.shape, dtype=np.uint16)
    wide = narrow.numpy().astype(np.uint16) << 8
    surfaces, pictures = torch.from_numpy(np.concatenate([wide, wide + low_bits])), Pictures(8, 16, coefficients())
    expected = rgb(surfaces, pictures)
    assert torch.equal(expected[:1], rgb(narrow, pictures)) and not torch.equal(expected[:1], expected[1:])
    assert torch.equal(patches(surfaces, pictures, [0, 1], (8, 16), torch.uint8), patchify(expected, SMALL))


@pytest.mark.parametrize(
    "surfaces, message",
    [
        (torch.zeros(2, 20, 32), "dtype|uint8"),
        (torch.zeros(2, 29, 32, dtype=torch.uint8), "cannot hold"),
        (torch.zeros(2, 30, 28, dtype=torch.uint8), "cannot hold"),
    ],
)
def test_surfaces_that_cannot_hold_the_frame_are_refused(surfaces: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patches(surfaces, Pictures(20, 30, coefficients()), [0, 1], (16, 24), torch.uint8)


def test_rows_of_another_shape_are_refused() -> None:
    surfaces, out = random_surfaces(2, 8, 8, pitch=8), torch.empty(3, SMALL.row_width)
    with pytest.raises(ValueError, match=r"\[4, 96\], got \[3, 96\]"):
        write_patches(surfaces, Pictures(8, 8, coefficients()), [0, 1], SMALL, (8, 8), out)

"""The surface kernel against the CPU path, bit for bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tempsamp_fast.video import Geometry, Sampling, load_videos, normalise_rows
from tempsamp_fast.video.nv12 import Colour, surfaces_to_patches
from tempsamp_fast.video.patches import patchify, resize_frames

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Geometry(patch_size=4, min_pixels=64, total_pixels=None)


def random_surfaces(num_frames: int, height: int, width: int, pitch: int) -> Tensor:
    rows = (height + height % 2) * 3 // 2
    generator = torch.Generator().manual_seed(width)
    return torch.randint(0, 256, (num_frames, rows, pitch), dtype=torch.uint8, generator=generator)


def rgb(surfaces: Tensor, height: int, width: int, colour: Colour) -> Tensor:
    """[T, 3, height, width] uint8: swscale's integer conversion written with whole planes, nearest chroma."""
    offset, luma_scale, red_v, green_u, green_v, blue_u = colour.coefficients()
    planes = surfaces.to(torch.int32)
    luma = (((planes[:, :height, :width] << 3) - offset) * luma_scale) >> 16
    chroma = planes[:, height + height % 2 :].repeat_interleave(2, dim=1)[:, :height]
    u = (chroma[:, :, 0::2].repeat_interleave(2, dim=2)[..., :width] << 3) - 1024
    v = (chroma[:, :, 1::2].repeat_interleave(2, dim=2)[..., :width] << 3) - 1024
    red = luma + (v * red_v >> 16)
    green = luma + (u * green_u >> 16) + (v * green_v >> 16)
    blue = luma + (u * blue_u >> 16)
    return torch.stack([red, green, blue], dim=1).clamp(0, 255).to(torch.uint8)


def both_paths(
    surfaces: Tensor, size: tuple[int, int], frame_size: tuple[int, int], colour: Colour, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(ours, the CPU path's)."""
    rows = patchify(resize_frames(rgb(surfaces, *size, colour), frame_size), SMALL)
    ours = surfaces_to_patches(surfaces.to(DEVICE), *size, SMALL, frame_size, dtype, colour)
    return ours.cpu(), normalise_rows(rows, SMALL, dtype)


@pytest.mark.parametrize("size, frame_size", [((12, 22), (8, 16)), ((6, 10), (8, 40)), ((8, 16), (8, 16))])
def test_kernel_gives_the_bits_of_the_cpu_path(size: tuple[int, int], frame_size: tuple[int, int]) -> None:
    """Down, up over two tiles, and unchanged; three frames, so that the last is repeated."""
    ours, expected = both_paths(random_surfaces(3, *size, pitch=64), size, frame_size, Colour(), torch.uint8)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("matrix", ["bt601", "bt709", "bt2020"])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_of_every_matrix_and_range_are_those_of_the_cpu_path(matrix, full_range: bool) -> None:
    colour = Colour(matrix, full_range)
    ours, expected = both_paths(random_surfaces(2, 8, 8, pitch=16), (8, 8), (8, 8), colour, torch.uint8)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_rows_are_those_of_the_cpu_path(dtype: torch.dtype) -> None:
    ours, expected = both_paths(random_surfaces(2, 8, 8, pitch=16), (8, 8), (8, 8), Colour(), dtype)
    assert torch.equal(ours, expected)


def test_sixteen_bit_surfaces_of_eight_bit_values_are_the_same() -> None:
    surfaces = random_surfaces(2, 8, 16, pitch=16)
    wide = torch.from_numpy(surfaces.numpy().astype(np.uint16) << 8)
    narrow_rows, wide_rows = (
        surfaces_to_patches(planes.to(DEVICE), 8, 16, SMALL, (8, 16), torch.uint8, Colour("bt709")).cpu()
        for planes in (surfaces, wide)
    )
    assert torch.equal(narrow_rows, wide_rows)


def test_frames_of_a_real_decoder_give_the_patches_of_load_videos(corpus: Path) -> None:
    """NV12 as the command line decodes it, against the whole CPU path."""
    video = corpus / "h264_16x16.mp4"
    geometry = Geometry(patch_size=4, min_pixels=24 * 24, total_pixels=None)
    expected = load_videos([(video, Sampling("hf_qwen3", max_frames=4))], geometry, dtype=torch.uint8)
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", video, "-pix_fmt", "nv12", "-f", "rawvideo", "-"]
    raw = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.uint8)
    surfaces = torch.from_numpy(raw.reshape(-1, 24, 16)[[0, 50, 99, 149]].copy())
    frame_size = geometry.frame_size(4, 16, 16)
    ours = surfaces_to_patches(surfaces.to(DEVICE), 16, 16, geometry, frame_size, torch.uint8, Colour())
    assert frame_size == (24, 24)
    assert torch.equal(ours.cpu(), expected.pixel_values)


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
        surfaces_to_patches(surfaces, 20, 30, SMALL, (16, 24), torch.uint8, Colour())


def test_unknown_matrix_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="bt709"):
        Colour("smpte240m").coefficients()  # type: ignore[arg-type]

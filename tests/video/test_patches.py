"""Patch rows against the arithmetic of the processors, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tempsamp_fast.video.geometry import CLIP_MEAN, CLIP_STD, Geometry
from tempsamp_fast.video.patches import normalise_rows, patchify, resize_frames, unpatchify

GEOMETRIES = [Geometry(), Geometry.of_family("qwen3_vl")]


def random_frames(num_frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * width + num_frames)
    return torch.randint(0, 256, (num_frames, 3, height, width), dtype=torch.uint8, generator=generator)


def spec_weights(source: int, target: int) -> tuple[list[tuple[int, np.ndarray]], int]:
    """Taps of one resize pass: per output pixel (first input, int16 weights), and their precision in bits."""
    scale = source / target
    support = 2.0 * max(scale, 1.0)
    taps = []
    for output in range(target):
        centre = scale * (output + 0.5)
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), source)
        x = np.abs((np.arange(first, last) - centre + 0.5) / max(scale, 1.0))
        a = -0.5
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * a - 4 * a
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        taps.append((first, weights / weights.sum()))
    largest = max(weights.max() for _, weights in taps)
    precision = max(p for p in range(23) if int(0.5 + largest * (1 << p)) < 1 << 15)
    return [
        (first, np.trunc(w * (1 << precision) + np.copysign(0.5, w)).astype(np.int64)) for first, w in taps
    ], precision


def spec_resize_pass(pixels: np.ndarray, target: int) -> np.ndarray:
    """One horizontal pass of the closed form over [..., width] uint8."""
    if pixels.shape[-1] == target:
        return pixels
    taps, precision = spec_weights(pixels.shape[-1], target)
    columns = [
        (pixels[..., first : first + len(w)].astype(np.int64) @ w + (1 << (precision - 1))) >> precision
        for first, w in taps
    ]
    return np.clip(np.stack(columns, axis=-1), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "source, target", [((90, 160), (56, 84)), ((45, 61), (84, 112)), ((56, 200), (56, 84)), ((3, 450), (28, 84))]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_resize_is_the_closed_form_of_integer_bicubic(source, target, memory_format) -> None:
    frames = random_frames(2, *source)
    wide = spec_resize_pass(frames.numpy(), target[1])
    expected = spec_resize_pass(wide.swapaxes(-1, -2), target[0]).swapaxes(-1, -2)
    ours = resize_frames(frames.contiguous(memory_format=memory_format), target)
    assert torch.equal(ours, torch.from_numpy(expected.copy()))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.family)
@pytest.mark.parametrize("num_frames", [4, 5])
def test_rows_are_those_of_transformers_video_processor(geometry: Geometry, num_frames: int) -> None:
    """Same order, padding and normalised bits; the processor's own resize needs torchvision, so it gets ours."""
    frames = random_frames(num_frames, 90, 161)
    resized = resize_frames(frames, geometry.frame_size(num_frames, 90, 161))
    mean, std = (torch.tensor(values) * 255 for values in (geometry.mean, geometry.std))
    normalised = (resized.float() - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    expected, *grid = Qwen3VLVideoProcessor.patchify(
        SimpleNamespace(), normalised[None], geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    )
    rows = normalise_rows(patchify(resized, geometry), geometry)
    assert tuple(grid) == geometry.grid_thw(num_frames, tuple(resized.shape[-2:]))
    assert torch.equal(rows, expected[0])


def test_two_equal_frames_give_the_rows_of_transformers_image_processor() -> None:
    picture = random_frames(1, 84, 140)
    geometry = Geometry(min_pixels=56 * 56, total_pixels=None)
    theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56)(picture[0].numpy(), return_tensors="pt")["pixel_values"]
    ours = normalise_rows(patchify(picture.repeat(2, 1, 1, 1), geometry), geometry)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_normalisation_is_a_table_of_256_values_per_channel() -> None:
    geometry = Geometry()
    values = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, geometry.row_width)
    rows = normalise_rows(values, geometry)
    for channel in range(3):
        mean, std = np.float32(255) * np.float32(CLIP_MEAN[channel]), np.float32(255) * np.float32(CLIP_STD[channel])
        table = (np.arange(256, dtype=np.float32) - mean) / std
        assert rows.view(256, 3, -1)[:, channel, 0].tolist() == table.tolist()
    assert torch.equal(normalise_rows(values, geometry, torch.bfloat16), rows.to(torch.bfloat16))
    assert normalise_rows(values, geometry, torch.uint8) is values


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: g.family)
def test_unpatchify_inverts_patchify(geometry: Geometry) -> None:
    frames = random_frames(6, 2 * geometry.factor, 3 * geometry.factor)
    rows = patchify(frames, geometry)
    assert torch.equal(unpatchify(rows, geometry.grid_thw(6, tuple(frames.shape[-2:])), geometry), frames)


def test_resize_leaves_frames_of_the_right_size_alone() -> None:
    frames = random_frames(2, 56, 56)
    assert resize_frames(frames, (56, 56)) is frames
    assert torch.equal(F.interpolate(frames, (56, 56), mode="bicubic", antialias=True), frames)


def test_unknown_dtype_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        normalise_rows(torch.zeros(1, 1176, dtype=torch.uint8), Geometry(), torch.float16)

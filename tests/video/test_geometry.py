"""Frame sizes against the processors of transformers, and the budget of qwen-vl-utils."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as transformers_qwen2
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as transformers_qwen3

from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.video.geometry import Geometry, smart_resize, smart_resize_video

SIDE = st.integers(1, 4000)


def outcome(function, *args):
    """The value, or that it refused."""
    try:
        return function(*args)
    except ValueError:
        return "refused"


@settings(max_examples=300)
@given(SIDE, SIDE, st.integers(1, 20), st.integers(20, 2000))
def test_frame_size_is_that_of_transformers_qwen2_5(height: int, width: int, least: int, most: int) -> None:
    bounds = (28, least * 784, most * 784)
    assert outcome(smart_resize, height, width, *bounds) == outcome(transformers_qwen2, height, width, *bounds)


@settings(max_examples=300)
@given(st.integers(1, 800), SIDE, SIDE, st.integers(1, 200), st.integers(200, 24576))
def test_video_size_is_that_of_transformers_qwen3(frames: int, height: int, width: int, least: int, most: int) -> None:
    bounds = (least * 1024, most * 1024)
    ours = outcome(smart_resize_video, frames, height, width, 32, *bounds)
    assert ours == outcome(transformers_qwen3, frames, height, width, 2, 32, *bounds)


def test_an_odd_number_of_frames_meets_the_bounds_of_qwen3_as_the_even_one_that_transformers_makes_of_it() -> None:
    """Three count as four: over the most pixels, as which they would not be."""
    bounds = (1024, 390 * 1024)
    ours = smart_resize_video(3, 320, 320, 32, *bounds)
    assert ours == transformers_qwen3(3, 320, 320, 2, 32, *bounds) == (352, 352)


@pytest.mark.parametrize("num_frames", [4, 20, 67, 768])
def test_budget_of_qwen_vl_utils_bounds_each_frame(num_frames: int) -> None:
    geometry = Geometry()
    budget = max(min(768 * 784, 3584 * 784 / num_frames * 2), int(16 * 784 * 1.05))
    assert geometry.frame_size(num_frames, 720, 1280) == transformers_qwen2(720, 1280, 28, 16 * 784, budget)


def test_without_a_budget_the_size_does_not_depend_on_the_number_of_frames() -> None:
    geometry = Geometry(total_pixels=None)
    assert geometry.frame_size(2, 720, 1280) == geometry.frame_size(700, 720, 1280) == (560, 1008)


def test_qwen3_cap_per_frame_is_that_of_transformers() -> None:
    """`cap_pixels_per_frame`: the even share, at most the cap, at least 1.05 times the minimum."""
    geometry = Geometry.of_family("qwen3_vl", max_pixels=768 * 1024)
    for num_frames in (4, 100, 768):
        share = max(min(768 * 1024, 14336 * 1024 // num_frames), int(4096 * 1.05)) * num_frames
        assert geometry.frame_size(num_frames, 720, 1280) == transformers_qwen3(
            num_frames, 720, 1280, 2, 32, 4096, share
        )


def test_sizes_come_from_the_model_config() -> None:
    vision = SimpleNamespace(patch_size=8, temporal_patch_size=2, spatial_merge_size=2)
    config = SimpleNamespace(model_type="qwen3_vl", vision_config=vision)
    geometry = geometry_of(config, min_pixels=56 * 56, total_pixels=10 * 56 * 56)
    assert (geometry.factor, geometry.row_width, geometry.mean) == (16, 3 * 2 * 64, (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="model_type"):
        geometry_of(SimpleNamespace(model_type="llava", vision_config=vision))


@pytest.mark.parametrize(
    ("family", "processor"), [("qwen2_5_vl", Qwen2VLImageProcessorPil), ("qwen3_vl", Qwen3VLVideoProcessor)]
)
def test_frames_are_normalised_as_by_the_processor_of_the_family(family: Any, processor: Any) -> None:
    geometry = Geometry.of_family(family)
    assert (list(geometry.mean), list(geometry.std)) == (list(processor.image_mean), list(processor.image_std))


@pytest.mark.parametrize(
    "bad", [{"family": "clip"}, {"patch_size": 0}, {"max_pixels": 5}, {"max_pixels": None}, {"total_pixels": 7}]
)
def test_out_of_range_settings_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Geometry(**bad)


def test_aspect_ratio_over_200_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect"):
        Geometry().frame_size(4, 10, 2001)

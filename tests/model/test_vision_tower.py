"""The vision tower with its patches as one product and with what it would find out about grids given to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.vision_tower import _facts, run_tower
from tempsamp_fast.video import normalise_rows


def test_patches_by_one_product_are_the_convolution(tiny) -> None:
    """Values and both gradients, in float64."""
    plain, prepared = tiny.model().double(), Policy(tiny.model().double()).base_model
    convolution, product = (model.model.visual.patch_embed.proj for model in (plain, prepared))
    patches = torch.randn(12, *convolution.weight.shape[1:], dtype=torch.float64)
    outputs = [module(patches).view(12, -1) for module in (convolution, product)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in convolution.named_parameters():
        torch.testing.assert_close(product.get_parameter(name).grad, parameter.grad, rtol=1e-11, atol=1e-11)


def test_the_product_runs_inside_the_module_that_owns_its_weight(tiny) -> None:
    """ZeRO-3 gathers a parameter around the forward of its module."""
    projection = Policy(tiny.model()).base_model.model.visual.patch_embed.proj
    seen = []
    projection.register_forward_pre_hook(lambda *_: seen.append(1))
    projection(torch.zeros(1, *projection.weight.shape[1:]))
    assert seen == [1]


def test_given_facts_are_what_transformers_finds(tiny) -> None:
    """Of several videos, whose frames are no multiple of a window among them."""
    plain, policy = tiny.model(), Policy(tiny.model())
    vision = policy.config.vision_config
    grids = torch.tensor([[2, 10, 6], [3, 4, 8]])
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(int(grids.prod(1).sum()), width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.model.visual(pixels, grid_thw=grids)
        actual = run_tower(policy.base_model, pixels, grids)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=1e-4, atol=2e-5)
    for own, other in zip(*(getattr(each, "deepstack_features", ()) for each in (actual, expected)), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-5)


def test_facts_of_a_grid_are_made_once(tiny) -> None:
    policy = Policy(tiny.model())
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    policy.encode_videos(row.pixel_values, row.video_grid_thw)
    before = _facts.cache_info()
    policy.encode_videos(row.pixel_values, row.video_grid_thw)
    after = _facts.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_the_longest_window_is_told(tiny) -> None:
    """Flash attention reads no further; on a CPU nobody looks at it."""
    vision = tiny.model().config.vision_config
    sizes = vision.spatial_merge_size, vision.window_size, vision.patch_size, 0
    facts = _facts(((2, 10, 6), (1, 4, 16)), sizes, torch.device("cpu"))
    assert facts["max_window_seqlen"] == int(facts["cu_window_seqlens"].diff().max()) > 1
    assert facts["max_seqlen"] == 64


def test_uint8_pixels_are_normalised_by_the_policy(tiny) -> None:
    """To the bits of pixels that were normalised before."""
    policy = Policy(tiny.model())
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    pixels = torch.randint(256, row.pixel_values.shape, generator=torch.Generator().manual_seed(0)).byte()
    rows = [replace(row, pixel_values=each) for each in (pixels, normalise_rows(pixels, geometry_of(policy.config)))]
    with torch.no_grad():
        assert torch.equal(*(policy(each) for each in rows))


def test_the_pixels_of_a_row_of_one_video_are_no_copy(tiny) -> None:
    group = tiny.groups()[0]
    (row,) = pack([group], config=tiny.model().config, max_tokens_per_row=10_000)
    assert row.pixel_values is group.prompt.video.pixel_values


def test_pixels_of_two_kinds_do_not_share_a_row(tiny) -> None:
    first, second = tiny.groups()[:2]
    video = replace(first.prompt.video, pixel_values=first.prompt.video.pixel_values.byte())
    first.prompt = replace(first.prompt, video=video)
    with pytest.raises(AssertionError, match="uint8"):
        pack([first, second], config=tiny.model().config, max_tokens_per_row=10_000)

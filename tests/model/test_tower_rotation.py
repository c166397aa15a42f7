"""The tower's rotation in place, in Triton's interpreter, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tempsamp_fast.model.tower_rotation import RotatedInPlace

NUM_PATCHES = 5


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    query, key, value = qkv.view(len(qkv), 3, heads, -1).unbind(1)
    return torch.stack([*apply_rotary_pos_emb_vision(query, key, cos, sin), value], dim=1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 10), (4, 16)])
def test_queries_and_keys_turn_as_transformers_turns_them_and_values_stay(
    dtype: torch.dtype, heads: int, dim: int
) -> None:
    generator = torch.Generator().manual_seed(heads)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    angles = draw(NUM_PATCHES, dim // 2).repeat(1, 2)
    given, weight = (draw(NUM_PATCHES, 3 * heads * dim).to(dtype) for _ in range(2))
    ours, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
    copy = ours.clone()
    output = RotatedInPlace.apply(copy, angles.cos(), angles.sin(), heads)
    expected = rotated(theirs, angles.cos(), angles.sin(), heads)
    assert output.data_ptr() == copy.data_ptr()
    # The interpreter cuts bfloat16 off where others round; a GPU does not.
    tolerance = dict.fromkeys(("rtol", "atol"), {torch.float32: 1e-6, torch.float16: 0.0, torch.bfloat16: 8e-3}[dtype])
    torch.testing.assert_close(output, expected, **tolerance)
    gradients = [torch.autograd.grad(each, leaf, weight)[0] for each, leaf in ((output * 1, ours), (expected, theirs))]
    torch.testing.assert_close(*gradients, **tolerance)

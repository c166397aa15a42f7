"""Rotary positions of a vision tower's queries and keys, in place in what its one product of all three gives."""

from __future__ import annotations

from typing import Any

import torch
from tempsamp_kernels.launch import launch
from tempsamp_kernels.optional_triton import tl, triton
from torch import Tensor
from torch.autograd.function import once_differentiable


class RotatedInPlace(torch.autograd.Function):
    """x cos + rotate_half(x) sin of queries and keys, as transformers' `apply_rotary_pos_emb_vision` has it.

    `apply(qkv [N, 3 * heads * dim], cos and sin [N, dim] float32, heads)`: changes qkv, where queries come first, then
    keys, then values, and returns it. cos and sin hold each angle twice, a half of `dim` apart. Rounds once, from
    float32. Its gradient is changed in place too, so it may be nobody else's.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rotate(qkv, cos, sin, heads, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient.contiguous(), cos, sin, ctx.heads, True), None, None, None


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, is_inverse: bool) -> Tensor:
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    half = cos.shape[1] // 2
    launch(
        tower_rotation_kernel,
        (len(qkv),),
        qkv=qkv,
        cos=cos,
        sin=sin,
        num_rotated=2 * heads,
        half=half,
        row_len=qkv.shape[1],
        IS_INVERSE=is_inverse,
        BLOCK_HEADS=triton.next_power_of_2(2 * heads),
        BLOCK_HALF=triton.next_power_of_2(half),
    )
    return qkv


@triton.jit
def tower_rotation_kernel(
    qkv,
    cos,
    sin,
    num_rotated: tl.constexpr,
    half: tl.constexpr,
    row_len: tl.constexpr,
    IS_INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program per patch."""
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    is_angle = columns < half
    is_rotated = (heads < num_rotated) & is_angle
    c = tl.load(cos + row * 2 * half + columns, mask=is_angle, other=0.0)
    s = tl.load(sin + row * 2 * half + columns, mask=is_angle, other=0.0)
    if IS_INVERSE:
        s = -s
    first = qkv + row * row_len + heads * 2 * half + columns
    x = tl.load(first, mask=is_rotated, other=0.0).to(c.dtype)
    y = tl.load(first + half, mask=is_rotated, other=0.0).to(c.dtype)
    tl.store(first, (x * c - y * s).to(qkv.dtype.element_ty), mask=is_rotated)
    tl.store(first + half, (y * c + x * s).to(qkv.dtype.element_ty), mask=is_rotated)

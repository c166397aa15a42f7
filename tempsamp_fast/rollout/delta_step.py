"""The gated delta rule for one new token per row, changing states in place: on a GPU they are read and written once."""

from __future__ import annotations

from tempsamp_kernels.launch import choose_impl, launch
from tempsamp_kernels.optional_triton import tl, triton
from torch import Tensor

from tempsamp_fast.model.linear_layers import normalised
from tempsamp_fast.rollout.rooms import pick

BLOCK_V = 32
"""Columns of a state that a program holds."""


def delta_step(
    states: Tensor, slots: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """state = decay * state + beta * key (value - key . decay * state), in place; returns query . state.

    states: [S, heads, key_dim, value_dim], contiguous, at least float32. slots: [R] int64, increasing: whose they are.
    query, key: [R, key_heads, key_dim], normalised here. value: [R, heads, value_dim]. log_decay, beta: [R, heads].
    impl: "triton" or "torch"; None: by the device of the states.
    Returns [R, heads, value_dim] in the value's dtype. Raises ValueError as `choose_impl` does.
    """
    repeats = value.shape[1] // key.shape[1]
    if choose_impl(impl, states) == "torch":
        state = pick(states, slots)
        query, key = (
            each.repeat_interleave(repeats, dim=1)[:, :, None]
            for each in normalised(query.to(state.dtype), key.to(state.dtype))
        )
        wide, log_decay, beta = (each.to(state.dtype) for each in (value, log_decay, beta))
        state.mul_(log_decay.exp()[..., None, None])
        correction = beta[..., None, None] * (wide[:, :, None] - key @ state)
        state.add_(key.mT * correction)
        if state is not states:
            states.index_copy_(0, slots, state)
        return (query @ state)[:, :, 0].to(value.dtype)
    num_rows, (_, heads, key_dim, value_dim) = len(slots), states.shape
    query, key, value, log_decay, beta = (each.contiguous() for each in (query, key, value, log_decay, beta))
    output = value.new_empty(value.shape)
    launch(
        delta_step_kernel,
        (num_rows * heads, triton.cdiv(value_dim, BLOCK_V)),
        states=states,
        slots=slots,
        query=query,
        key=key,
        value=value,
        log_decay=log_decay,
        beta=beta,
        output=output,
        heads=heads,
        repeats=repeats,
        scale=key_dim**-0.5,
        key_dim=key_dim,
        value_dim=value_dim,
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=BLOCK_V,
    )
    return output


@triton.jit
def delta_step_kernel(
    states,
    slots,
    query,
    key,
    value,
    log_decay,
    beta,
    output,
    heads,
    repeats,
    scale,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per head of a row and block of columns, of which none needs the others."""
    row_head = tl.program_id(0).to(tl.int64)
    key_head = row_head // heads * (heads // repeats) + row_head % heads // repeats
    rows, columns = tl.arange(0, BLOCK_K), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    has_row, has_column = rows < key_dim, columns < value_dim
    q = tl.load(query + key_head * key_dim + rows, mask=has_row, other=0.0).to(tl.float32)
    k = tl.load(key + key_head * key_dim + rows, mask=has_row, other=0.0).to(tl.float32)
    v = tl.load(value + row_head * value_dim + columns, mask=has_column, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q) + 1e-6) * tl.cast(scale, tl.float32)
    k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
    own = tl.load(slots + row_head // heads) * heads + row_head % heads
    places = states + own * key_dim * value_dim + rows[:, None] * value_dim + columns[None, :]
    stored = has_row[:, None] & has_column[None, :]
    s = tl.load(places, mask=stored, other=0.0) * tl.exp(tl.load(log_decay + row_head).to(tl.float32))
    s += k[:, None] * (tl.load(beta + row_head).to(tl.float32) * (v - tl.sum(s * k[:, None], 0)))[None, :]
    tl.store(places, s, mask=stored)
    read = tl.sum(s * q[:, None], 0)
    tl.store(output + row_head * value_dim + columns, read.to(output.dtype.element_ty), mask=has_column)

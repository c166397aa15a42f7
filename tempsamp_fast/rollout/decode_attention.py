"""Attention of one new token per row: to spans of keys that rows share, read once for all of them, and to its own keys.

Flash-decoding in two launches. The first gives every span of shared keys, cut into pieces, to the queries of all rows
that continue it, and keeps what each piece gives with its log-sum-exp. The second adds a row's own keys, the newest
among them, and merges. Scores and sums are float32, whatever the dtype of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from tempsamp_kernels.launch import choose_impl, launch
from tempsamp_kernels.optional_triton import tl, triton
from torch import Tensor

from tempsamp_fast.rollout.decode_in_torch import Batch, decode_in_torch
from tempsamp_fast.rollout.spans import Span, alike, rows_per_item

BLOCK_KEYS = 64
"""Keys that a program reads at a time, of heads of 128 at most."""


@dataclass(frozen=True)
class DecodedRows:
    """Which rows are decoded, and what of the shared keys each of them reads; the same for all layers."""

    slots: Tensor
    """[R] int64, increasing: where each row keeps its own keys."""
    step: Tensor
    """[1] int64: how many keys of its own every row has, the newest not among them."""
    spans: Sequence[Span]
    items: Tensor
    """[I, 5] int32: `Span.items` of all spans, then zeros."""
    num_parts: Tensor
    """[R] int32."""
    parts: Tensor
    """[R, P, heads, dim] float32: what the pieces give."""
    lses: Tensor
    """[R, P, heads] float32: their log-sum-exps."""

    @cached_property
    def batches(self) -> list[Batch]:
        """Of all spans, for `decode_in_torch`."""
        return [Batch(spans, self.slots.device) for spans in alike(self.spans)]


@dataclass(frozen=True)
class LayerKeys:
    """Of one layer: keys and values that rows share [T, kv_heads, dim], and their own [S, room, kv_heads, dim]."""

    keys: Tensor
    values: Tensor
    own_keys: Tensor
    own_values: Tensor


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, layer: LayerKeys, rows: DecodedRows, scaling: float,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """query [R, heads, dim] on all keys of its row -> the same shape; stores key and value [R, kv_heads, dim].

    impl: "triton" or "torch"; None: by the device. Raises ValueError as `choose_impl` does.
    """
    if choose_impl(impl, query) == "torch":
        return decode_in_torch(query, key, value, layer, rows, scaling)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    output = torch.empty_like(query)
    num_rows, num_heads, head_dim = query.shape
    heads_per_kv = num_heads // key.shape[1]
    block_d = max(16, triton.next_power_of_2(head_dim))
    shape = {
        "num_kv_heads": key.shape[1],
        "part_room": rows.lses.stride(0) // num_heads,
        "scaling": scaling,
        "heads_per_kv": heads_per_kv,
        "head_dim": head_dim,
        "BLOCK_N": min(BLOCK_KEYS, BLOCK_KEYS * 128 // block_d),
        "BLOCK_D": block_d,
        "num_warps": 4 if block_d <= 128 else 8,
    }
    most = min(num_rows, rows_per_item(num_heads, key.shape[1])) * heads_per_kv
    launch(
        shared_keys_kernel,
        (len(rows.items), key.shape[1]),
        query=query,
        keys=layer.keys,
        values=layer.values,
        items=rows.items,
        parts=rows.parts,
        lses=rows.lses,
        BLOCK_M=max(16, triton.next_power_of_2(most)),
        **shape,
    )
    launch(
        own_keys_kernel,
        (num_rows, key.shape[1]),
        query=query,
        key=key,
        value=value,
        own_keys=layer.own_keys,
        own_values=layer.own_values,
        slots=rows.slots,
        step=rows.step,
        num_parts=rows.num_parts,
        parts=rows.parts,
        lses=rows.lses,
        output=output,
        room=layer.own_keys.stride(0) // (key.shape[1] * head_dim),
        BLOCK_H=max(16, triton.next_power_of_2(heads_per_kv)),
        **shape,
    )
    return output


@triton.jit
def _read(
    query, keys, values, first, num_keys, stride, scaling, largest, total, summed,
    head_dim: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of queries [M, D] over `num_keys` keys, `stride` elements apart from element `first` on."""
    columns = tl.arange(0, BLOCK_D)
    for start in range(0, num_keys, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        is_key = position < num_keys
        places = first + position[:, None].to(tl.int64) * stride + columns[None, :]
        there = is_key[:, None] & (columns < head_dim)[None, :]
        k = tl.load(keys + places, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        grown = tl.maximum(largest, tl.max(scores, 1))
        fade, weights = tl.exp(largest - grown), tl.exp(scores - grown[:, None])
        v = tl.load(values + places, mask=there, other=0.0)
        summed = tl.dot(weights.to(v.dtype), v, summed * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(weights, 1)
        largest = grown
    return largest, total, summed


@triton.jit
def shared_keys_kernel(
    query,
    keys,
    values,
    items,
    parts,
    lses,
    num_kv_heads,
    part_room,
    scaling,
    heads_per_kv: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per piece of a span, block of its rows and head of keys; empty items end at once."""
    item, kv_head = items + tl.program_id(0) * 5, tl.program_id(1)
    first_row, num_rows = tl.load(item), tl.load(item + 1)
    first_key, num_keys, part = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    if num_rows == 0:
        return
    lanes, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    is_query = lanes < num_rows * heads_per_kv
    row, head = (first_row + lanes // heads_per_kv).to(tl.int64), kv_head * heads_per_kv + lanes % heads_per_kv
    num_heads, there = num_kv_heads * heads_per_kv, is_query[:, None] & (columns < head_dim)[None, :]
    q = tl.load(query + ((row * num_heads + head) * head_dim)[:, None] + columns[None, :], mask=there, other=0.0)
    stride = num_kv_heads * head_dim
    first = first_key.to(tl.int64) * stride + kv_head * head_dim
    largest, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    summed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest, total, summed = _read(
        q, keys, values, first, num_keys, stride, scaling, largest, total, summed, head_dim, BLOCK_N, BLOCK_D
    )
    place = (row * part_room + part) * num_heads + head
    tl.store(parts + (place * head_dim)[:, None] + columns[None, :], summed / total[:, None], mask=there)
    tl.store(lses + place, largest + tl.log(total), mask=is_query)


@triton.jit
def own_keys_kernel(
    query,
    key,
    value,
    own_keys,
    own_values,
    slots,
    step,
    num_parts,
    parts,
    lses,
    output,
    num_kv_heads,
    part_room,
    room,
    scaling,
    heads_per_kv: tl.constexpr,
    head_dim: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per row and head of keys: stores the newest, reads it with those before it, adds what rows share."""
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, num_own = tl.load(slots + row), tl.load(step)
    lanes, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    is_head, is_column = lanes < heads_per_kv, columns < head_dim
    there = is_head[:, None] & is_column[None, :]
    num_heads, head = num_kv_heads * heads_per_kv, kv_head * heads_per_kv + lanes
    places = ((row * num_heads + head) * head_dim)[:, None] + columns[None, :]
    q = tl.load(query + places, mask=there, other=0.0)
    newest = (row * num_kv_heads + kv_head) * head_dim + columns
    k, v = tl.load(key + newest, mask=is_column, other=0.0), tl.load(value + newest, mask=is_column, other=0.0)
    stride = num_kv_heads * head_dim
    first = slot * room * stride + kv_head * head_dim
    tl.store(own_keys + first + num_own * stride + columns, k, mask=is_column)
    tl.store(own_values + first + num_own * stride + columns, v, mask=is_column)
    largest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scaling
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    summed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32) + v.to(tl.float32)[None, :]
    largest, total, summed = _read(
        q, own_keys, own_values, first, num_own, stride, scaling, largest, total, summed, head_dim, BLOCK_N, BLOCK_D
    )
    for part in range(0, tl.load(num_parts + row)):
        place = (row * part_room + part) * num_heads + head
        lse = tl.load(lses + place, mask=is_head, other=0.0)
        theirs = tl.load(parts + (place * head_dim)[:, None] + columns[None, :], mask=there, other=0.0)
        grown = tl.maximum(largest, lse)
        fade, share = tl.exp(largest - grown), tl.exp(lse - grown)
        summed = summed * fade[:, None] + theirs * share[:, None]
        total = total * fade + share
        largest = grown
    tl.store(output + places, (summed / total[:, None]).to(output.dtype.element_ty), mask=there)

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
import triton
import triton.language as tl
from tempsamp_kernels.head import multiplies_into_fp32
from tempsamp_kernels.launch import choose_impl, launch
from torch import Tensor

from tempsamp_fast.model.linear_layers import at_least_float32
from tempsamp_fast.rollout.rooms import pick
from tempsamp_fast.rollout.spans import Span, alike, rows_per_item

BLOCK_KEYS = 64
"""Keys that a program reads at a time, of heads of 128 at most."""


class Batch:
    """Spans of as many rows each, read at once: `rows` and `tokens` of one span are views, of several are gathered."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.num_spans, self.is_none = len(spans), None
        if len(spans) == 1:
            (span,) = spans
            self.rows: slice | Tensor = slice(span.first_row, span.first_row + span.num_rows)
            self.tokens: slice | Tensor = slice(span.first_key, span.first_key + span.num_keys)
            return
        rows, first, lengths = torch.tensor([[s.first_row, s.first_key, s.num_keys] for s in spans], device=device).T
        counted = torch.arange(spans[-1].num_keys, device=device)
        self.rows = (rows[:, None] + torch.arange(spans[0].num_rows, device=device)).flatten()
        self.tokens = first[:, None] + counted.minimum(lengths[:, None] - 1)
        self.is_none = (counted >= lengths[:, None])[:, None, None]

    def queries(self, query: Tensor) -> Tensor:
        """[R, kv_heads, group, dim] -> [spans, kv_heads, rows * group, dim]."""
        return query[self.rows].unflatten(0, (self.num_spans, -1)).transpose(1, 2).flatten(2, 3)

    def keys(self, shared: Tensor) -> Tensor:
        """[T, kv_heads, dim] -> [spans, kv_heads, K, dim]."""
        found = shared[self.tokens]
        return found.view(self.num_spans, -1, *shared.shape[1:]).transpose(1, 2)

    def by_row(self, values: Tensor, group: int) -> Tensor:
        """[spans, kv_heads, rows * group, ...] -> [rows of all spans, kv_heads, group, ...]."""
        return values.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


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
        """Of all spans, for `_in_torch`."""
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
        return _in_torch(query, key, value, layer, rows, scaling)
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


def _in_torch(query: Tensor, key: Tensor, value: Tensor, layer: LayerKeys, rows: DecodedRows, scaling: float) -> Tensor:
    """Own keys with room for more, which are masked; then one product per batch of spans."""
    newest = rows.slots, rows.step.expand(len(query))
    layer.own_keys[newest], layer.own_values[newest] = key, value
    query = query.unflatten(1, (key.shape[1], -1))
    own_keys, own_values = (pick(own, rows.slots).transpose(1, 2) for own in (layer.own_keys, layer.own_values))
    is_later = torch.arange(own_keys.shape[2], device=query.device) > rows.step
    output, lse = attend(query, own_keys, own_values, scaling, is_later)
    for batch in rows.batches:
        keys, values = batch.keys(layer.keys), batch.keys(layer.values)
        found = attend(batch.queries(query), keys, values, scaling, batch.is_none)
        theirs, their_lse = (batch.by_row(each, query.shape[2]) for each in found)
        share = torch.sigmoid(their_lse - lse[batch.rows])[..., None]
        output[batch.rows] = torch.lerp(output[batch.rows], theirs, share)
        lse[batch.rows] = torch.logaddexp(lse[batch.rows], their_lse)
    return output.flatten(1, 2).to(value.dtype)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, is_masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries [B, heads, Q, dim] on [B, heads, K, dim] -> outputs, and log-sum-exps [B, heads, Q], at least float32.

    is_masked: [K] or [B, 1, 1, K] bool, keys that are not there.
    """
    scores = _product(query, keys.transpose(-1, -2)) * scaling
    if is_masked is not None:
        scores = scores.masked_fill(is_masked, float("-inf"))
    lse = scores.logsumexp(-1)
    return _product((scores - lse[..., None]).exp().to(values.dtype), values), lse


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of [B, heads, ...] unrounded: scores rounded to bfloat16 are off by 1 to 18 % of attention."""
    if multiplies_into_fp32(left.device.type, left.dtype):
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, left.shape[:2])
    wide = at_least_float32(left.dtype)
    return left.to(wide) @ right.to(wide)

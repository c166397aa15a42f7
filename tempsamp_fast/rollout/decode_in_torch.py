"""The twin of the decoding kernels in torch, for a CPU: own keys, then the shared spans of like size at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tempsamp_kernels.head import multiplies_into_fp32
from torch import Tensor

from tempsamp_fast.model.linear_layers import at_least_float32
from tempsamp_fast.rollout.rooms import pick
from tempsamp_fast.rollout.spans import Span

if TYPE_CHECKING:
    from tempsamp_fast.rollout.decode_attention import DecodedRows, LayerKeys


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


def decode_in_torch(
    query: Tensor, key: Tensor, value: Tensor, layer: LayerKeys, rows: DecodedRows, scaling: float
) -> Tensor:
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

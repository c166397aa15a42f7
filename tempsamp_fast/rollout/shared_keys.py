"""Keys and values of what several rows continue: of each prompt, or of each video and of each question about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from tempsamp_kernels.head import multiplies_into_fp32
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tempsamp_fast.model.attention import PrefillAttention


class SharedKeys:
    """Token spans that rows continue, each stored and read once; padded to the longest."""

    def __init__(
        self, keys: Mapping[int, Sequence[Tensor]], values: Mapping[int, Sequence[Tensor]], row_spans: Tensor
    ) -> None:
        """keys, values: by layer, [length, kv_heads, dim] of each span. row_spans: [R] int64, increasing."""
        first = next(iter(keys.values()))
        lengths = torch.tensor([len(span) for span in first], device=row_spans.device)
        is_padding = torch.arange(int(lengths.max()), device=row_spans.device) >= lengths[:, None]
        self._bias = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill(is_padding, float("-inf"))
        self._keys = {layer: _pad(spans) for layer, spans in keys.items()}
        self._values = {layer: _pad(spans) for layer, spans in values.items()}
        self._row_spans = row_spans
        self._assign_slots()

    def attend(self, layer_index: int, query: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """query [R, kv_heads, heads_per_kv, dim] -> float32 of that shape, and log-sum-exps without the last axis."""
        num_spans, heads_per_kv = len(self._bias), query.shape[2]
        stacked = query.new_zeros(num_spans * self._num_slots, *query.shape[1:])
        stacked[self._slots] = query
        stacked = stacked.unflatten(0, (num_spans, -1)).transpose(1, 2).flatten(2, 3)
        keys, values = self._keys[layer_index], self._values[layer_index]
        output, lse = attend(stacked, keys, values, self._bias[:, None, None], scaling)
        unstack = lambda tensor: tensor.unflatten(2, (-1, heads_per_kv)).transpose(1, 2).flatten(0, 1)[self._slots]
        return unstack(output), unstack(lse)

    def retire(self, keep: Tensor) -> None:
        """Keep only these rows ([R] int64, increasing) and the spans that they continue."""
        spans, self._row_spans = self._row_spans[keep].unique(return_inverse=True)
        if len(spans) < len(self._bias):
            self._keys = {layer: keys[spans] for layer, keys in self._keys.items()}
            self._values = {layer: values[spans] for layer, values in self._values.items()}
            self._bias = self._bias[spans]
        self._assign_slots()

    def _assign_slots(self) -> None:
        """Give the rows of a span places 0, 1, ..., so that their queries stack into one matrix per span."""
        counts = torch.bincount(self._row_spans, minlength=len(self._bias))
        first = counts.cumsum(0) - counts
        place = torch.arange(len(self._row_spans), device=counts.device) - first[self._row_spans]
        self._num_slots = int(counts.max())
        self._slots = self._row_spans * self._num_slots + place


def shared_levels(prefills: Sequence[PrefillAttention], row_prompts: Tensor) -> list[SharedKeys]:
    """One level of prompts; two, of videos and of questions, where prompts of these rows share their beginning.

    A prompt alone among them counts as a video and the question of its last token.
    """
    trees = [tree for prefill in prefills for tree in prefill.layout]
    has_trees = any(len(tree.nodes) > 1 for tree in trees)
    roots, questions = [], []
    for tree in trees:
        root, *rest = [(node.start, node.start + node.length) for node in tree.nodes]
        if has_trees and not rest:
            root, rest = (root[0], root[1] - 1), [(root[1] - 1, root[1])]
        roots.append([root])
        questions.append(rest)
    levels = [(roots, row_prompts)]
    if has_trees:
        tree_of = [index for index, of_tree in enumerate(questions) for _ in of_tree]
        row_trees = torch.tensor(tree_of, device=row_prompts.device)[row_prompts]
        levels = [(roots, row_trees), (questions, row_prompts)]
    return [
        SharedKeys(
            {layer: _cut(prefills, layer, "keys", spans) for layer in prefills[0].keys},
            {layer: _cut(prefills, layer, "values", spans) for layer in prefills[0].keys},
            row_spans,
        )
        for spans, row_spans in levels
    ]


def attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Queries [B, heads, Q, dim] on [B, heads, K, dim] -> outputs, and log-sum-exps [B, heads, Q], both float32."""
    scores = _product(query, keys.transpose(-1, -2)) * scaling + bias
    lse = scores.logsumexp(-1)
    return _product((scores - lse[..., None]).exp().to(values.dtype), values), lse


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of [B, heads, ...] in float32: scores rounded to bfloat16 are off by 1 to 18 % of attention."""
    if multiplies_into_fp32(left.device.type, left.dtype):
        product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, left.shape[:2])
    return left.float() @ right.float()


def _cut(
    prefills: Sequence[PrefillAttention], layer: int, what: str, spans: Sequence[Sequence[tuple[int, int]]]
) -> list[Tensor]:
    """[length, kv_heads, dim] of every span; spans are counted from the first token of their tree."""
    pieces, waiting = [], iter(spans)
    for prefill in prefills:
        tokens = getattr(prefill, what)[layer][0].transpose(0, 1)
        starts = accumulate((tree.num_tokens for tree in prefill.layout), initial=0)
        for start, _ in zip(starts, prefill.layout, strict=False):
            pieces += [tokens[start + first : start + last] for first, last in next(waiting)]
    return pieces


def _pad(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [length, heads, dim] -> [N, heads, longest, dim], zeros after each."""
    return pad_sequence(list(tensors), batch_first=True).transpose(1, 2).contiguous()

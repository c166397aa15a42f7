"""Packed attention out of SDPA calls: runs everywhere, trains everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tempsamp_fast.model.fla_layers import packed_recurrence
from tempsamp_fast.model.layout import GroupLayout, Node
from tempsamp_fast.model.linear_layers import State
from tempsamp_fast.system.device import sent

BRANCH_BLOCK = 256
"""Branches of a group are attended together up to this many tokens: fewer calls, against masked-out work."""


@dataclass(frozen=True)
class _BranchBlock:
    """Neighbouring branches of one parent, attended in one call."""

    tokens: slice
    mask: Tensor
    """[block_len, prefix_len + block_len] additive: everything in the prefix, own branch causally."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], scaling: float
    ) -> Tensor:
        """prefix: its keys and values. Returns [1, heads, block_len, dim]."""
        prefix_key, prefix_value = prefix
        key = torch.cat([prefix_key, key[:, :, self.tokens]], dim=2)
        value = torch.cat([prefix_value, value[:, :, self.tokens]], dim=2)
        return _sdpa(query[:, :, self.tokens], key, value, scaling, attn_mask=self.mask)


class SplitAttention:
    """A `PackedAttention`: causal over each prompt, then branches of one parent at a time against `[path | own]`."""

    def __init__(self, layout: Sequence[GroupLayout], *, dtype: torch.dtype, device: torch.device) -> None:
        self.recurrence = packed_recurrence(layout, device)
        self._parts: list[tuple[list[slice], list[_BranchBlock]]] = []
        """By tokens: those that the blocks continue, in one causal call by themselves where there are no blocks."""
        start = 0
        for group in layout:
            spans = [slice(start + node.start, start + node.start + node.length) for node in group.nodes]
            start += group.num_tokens
            if len(spans) == 2:  # a single branch simply continues its prompt
                self._parts.append(([slice(spans[0].start, spans[1].stop)], []))
                continue
            self._parts.append((spans[:1], []))
            for path, siblings in groupby(zip(group.nodes[1:], spans[1:], strict=True), lambda each: each[0].path):
                branches, prefix = list(siblings), [spans[each] for each in path]
                prefix_len = sum(group.nodes[each].length for each in path)
                lengths = [node.length for node, _ in branches]
                blocks = _branch_blocks(branches[0][1].start, prefix_len, lengths, dtype, device)
                self._parts.append((prefix, blocks))

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        outputs = []
        for spans, blocks in self._parts:
            prefix = _gathered(key, spans), _gathered(value, spans)
            if blocks:
                outputs += [block.attend(query, key, value, prefix, scaling) for block in blocks]
            else:
                outputs.append(_sdpa(_gathered(query, spans), *prefix, scaling, is_causal=True))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _gathered(tensor: Tensor, spans: Sequence[slice]) -> Tensor:
    """The tokens of [1, heads, N, dim] in these spans, one after the other; of one span a view."""
    pieces = [tensor[:, :, span] for span in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


@dataclass
class KeptNodes:
    """What nodes of one tree hand on to those that continue them, node after node from the root on."""

    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    """By layer that attends: [1, kv_heads, length, dim] of each node."""
    values: dict[int, list[Tensor]] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    """By linear layer: how each node ends."""

    def add(
        self,
        lengths: Sequence[int],
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        states: Mapping[int, State],
    ) -> None:
        """The next nodes, as they ran together: keys and values [1, kv_heads, sum of lengths, dim]."""
        for kept, added in ((self.keys, keys), (self.values, values)):
            for layer, tensor in added.items():
                kept.setdefault(layer, []).extend(tensor.split(lengths, dim=2))
        for layer, (read, inputs) in states.items():
            before = self.states.get(layer)
            self.states[layer] = (
                (read, inputs) if before is None else (torch.cat([before[0], read]), torch.cat([before[1], inputs]))
            )


class BranchAttention:
    """A `PackedAttention` for nodes of one depth alone, whose ancestors were run before them."""

    def __init__(self, nodes: Sequence[Node], kept: KeptNodes) -> None:
        """kept: has all of their ancestors."""
        self._kept = kept
        own_keys = next(iter(kept.keys.values()))
        dtype, device = own_keys[0].dtype, own_keys[0].device
        branches = [GroupLayout(node.length, ()) for node in nodes]
        self.recurrence = packed_recurrence(branches, device, dict(kept.states), [node.path[-1] for node in nodes])
        self._parts: list[tuple[tuple[int, ...], list[_BranchBlock]]] = []
        """The nodes of one parent together, beside their path."""
        start = 0
        for path, siblings in groupby(nodes, lambda node: node.path):
            lengths = [node.length for node in siblings]
            prefix_len = sum(own_keys[each].shape[2] for each in path)
            self._parts.append((path, _branch_blocks(start, prefix_len, lengths, dtype, device)))
            start += sum(lengths)

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        outputs = []
        for path, blocks in self._parts:
            prefix = _on_path(self._kept.keys[layer_index], path), _on_path(self._kept.values[layer_index], path)
            outputs += [block.attend(query, key, value, prefix, scaling) for block in blocks]
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _on_path(kept: Sequence[Tensor], path: Sequence[int]) -> Tensor:
    return kept[path[0]] if len(path) == 1 else torch.cat([kept[each] for each in path], dim=2)


def attend_windows(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """Full attention inside each window, one batched call per window size; [N, heads, dim] -> the same shape.

    cu_seqlens: [num_windows + 1] int32, where windows begin and end.
    """
    by_size = windows_by_size(cu_seqlens)
    if len(by_size) == 1:
        return _attend_equal_windows(query, key, value, next(iter(by_size)), scaling)
    output = torch.empty_like(query)
    for size, tokens in by_size.items():
        windows = _attend_equal_windows(query[tokens], key[tokens], value[tokens], size, scaling)
        output = output.index_copy(0, tokens, windows)
    return output


def windows_by_size(cu_seqlens: Tensor) -> dict[int, Tensor]:
    """The tokens [n] int64 of all windows of a size; kept with the tensor, so that no later layer waits for them."""
    kept: dict[int, Tensor] | None = getattr(cu_seqlens, "windows_by_size", None)
    if kept is None:
        bounds = cu_seqlens.cpu()
        starts, lengths = bounds[:-1], bounds.diff()
        kept = {
            size: sent((starts[lengths == size, None] + torch.arange(size)).flatten(), cu_seqlens.device)
            for size in lengths.unique().tolist()
        }
        cu_seqlens.windows_by_size = kept  # type: ignore[attr-defined]
    return kept


def _attend_equal_windows(query: Tensor, key: Tensor, value: Tensor, size: int, scaling: float) -> Tensor:
    query, key, value = (tensor.unflatten(0, (-1, size)).transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float, **mask: Any) -> Tensor:
    enable_gqa = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=enable_gqa, **mask)


def _branch_blocks(
    start: int, prompt_len: int, branch_lens: Sequence[int], dtype: torch.dtype, device: torch.device
) -> list[_BranchBlock]:
    """Blocks of whole branches; the first branch starts at token `start`."""
    blocks: list[list[int]] = []
    for length in branch_lens:
        if not blocks or sum(blocks[-1]) + length > BRANCH_BLOCK:
            blocks.append([])
        blocks[-1].append(length)
    result = []
    for lengths in blocks:
        mask = sent(_branch_mask(prompt_len, torch.tensor(lengths), dtype), device)
        result.append(_BranchBlock(slice(start, start + sum(lengths)), mask))
        start += sum(lengths)
    return result


def _branch_mask(prompt_len: int, branch_lens: Tensor, dtype: torch.dtype) -> Tensor:
    branch = torch.repeat_interleave(branch_lens)
    index = torch.arange(len(branch))
    own = (branch[:, None] == branch[None, :]) & (index[:, None] >= index[None, :])
    visible = torch.cat([own.new_ones(len(branch), prompt_len), own], dim=1)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))

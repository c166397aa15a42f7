"""Packed attention as one FlexAttention call over a block mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad

from tempsamp_fast.model.fla_layers import packed_recurrence
from tempsamp_fast.model.layout import GroupLayout

BLOCK = 128
"""Rows are padded to a multiple of FlexAttention's block, so that few shapes are compiled."""


class FlexAttention:
    """A `PackedAttention`: one fused call per layer on CUDA; on the CPU only without gradients."""

    def __init__(self, layout: Sequence[GroupLayout], *, device: torch.device) -> None:
        self.recurrence = packed_recurrence(layout, device)
        self._num_tokens = sum(group.num_tokens for group in layout)
        self._padding = -self._num_tokens % BLOCK
        self._block_mask = _block_mask(layout, self._padding, device)

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        attend: Any = _compiled_flex_attention() if query.is_cuda else flex_attention
        query, key, value = (pad(tensor, (0, 0, 0, self._padding)) for tensor in (query, key, value))
        enable_gqa = query.shape[1] != key.shape[1]
        output = attend(query, key, value, block_mask=self._block_mask, scale=scaling, enable_gqa=enable_gqa)
        return output[:, :, : self._num_tokens].transpose(1, 2)


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    # Static shapes would compile anew, for many seconds, at every row length.
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(layout: Sequence[GroupLayout], padding: int, device: torch.device) -> BlockMask:
    """A token sees the nodes on its path and its own up to itself. Padding is a node of its own."""
    lengths = torch.tensor([node.length for group in layout for node in group.nodes] + [padding])
    is_on_path, first = torch.eye(len(lengths), dtype=torch.bool), 0
    for group in layout:
        for index, node in enumerate(group.nodes):
            is_on_path[first + index, [first + each for each in node.path]] = True
        first += len(group.nodes)
    is_on_path = is_on_path.to(device)
    node_of = torch.repeat_interleave(lengths).to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_on_path[node_of[query], node_of[key]] & (query >= key)

    return create_block_mask(sees, None, None, len(node_of), len(node_of), device=device, BLOCK_SIZE=BLOCK)

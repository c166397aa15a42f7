"""Attention of packed rows and of the vision tower, registered through transformers' attention interface.

What a text layer attends to travels as the extra keyword `packed_attention` of the language model's forward: a
callable `(layer_index, query, key, value, scaling) -> output` that knows the layout of the row. Without it the
registered function is transformers' own SDPA attention, so that a model prepared here still runs plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tempsamp_fast.packing import GroupLayout

TEXT_ATTENTION = "tempsamp_packed"
# transformers hands the vision tower's whole sequence over in one call only to names that contain "flash".
VISION_ATTENTION = "tempsamp_vision_flash"

BRANCH_BLOCK = 256
"""Branches of a group are attended together up to this many tokens: fewer calls, against masked-out work."""


class PackedAttention(Protocol):
    """How the tokens of one forward pass attend, in every text layer."""

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, heads, N, dim], key and value [B, kv_heads, N, dim] -> [B, N, heads, dim]."""


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch the text layers and the vision tower of `model` to this module's attention."""
    model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})


def text_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    packed_attention: PackedAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention contract: [B, heads, N, dim] in, ([B, N, heads, dim], None) out."""
    if packed_attention is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert attention_mask is None, "a packed row carries its own mask"
    return packed_attention(module.layer_idx, query, key, value, scaling), None


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each window, one batched call per window size; [1, heads, N, dim] in."""
    lengths = cu_seq_lens_q.diff()
    sizes = lengths.unique().tolist()
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if len(sizes) == 1:
        return _attend_windows(query, key, value, sizes[0], scaling)[None], None
    output = torch.empty_like(query)
    for size in sizes:
        starts = cu_seq_lens_q[:-1][lengths == size]
        tokens = (starts[:, None] + torch.arange(size, device=starts.device)).flatten()
        windows = _attend_windows(query[tokens], key[tokens], value[tokens], size, scaling)
        output = output.index_copy(0, tokens, windows)
    return output[None], None


def _attend_windows(query: Tensor, key: Tensor, value: Tensor, size: int, scaling: float) -> Tensor:
    """[num_windows * size, heads, dim] -> the same shape."""
    query, key, value = (tensor.unflatten(0, (-1, size)).transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(TEXT_ATTENTION, text_attention)
# Without a mask function of its own, a registered attention never sees the padding mask of a plain forward.
AttentionMaskInterface.register(TEXT_ATTENTION, sdpa_mask)
AttentionInterface.register(VISION_ATTENTION, vision_attention)


@dataclass(frozen=True)
class _BranchBlock:
    """Neighbouring branches of one group, attended in one call."""

    tokens: slice
    mask: Tensor
    """[block_len, prompt_len + block_len] additive: everything in the prompt, own branch causally."""


class SplitAttention:
    """Packed attention out of SDPA calls: causal over each prompt, then its branches against `[prompt | own]`."""

    def __init__(self, layout: Sequence[GroupLayout], *, dtype: torch.dtype, device: torch.device) -> None:
        self._groups: list[tuple[slice, list[_BranchBlock]]] = []
        start = 0
        for group in layout:
            # A single branch simply continues its prompt.
            prefix = group.prompt_len if len(group.branch_lens) > 1 else group.num_tokens
            blocks = _branch_blocks(start, group, dtype, device) if prefix < group.num_tokens else []
            self._groups.append((slice(start, start + prefix), blocks))
            start += group.num_tokens

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        attend = partial(scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        outputs = []
        for prefix, blocks in self._groups:
            prefix_key, prefix_value = key[:, :, prefix], value[:, :, prefix]
            outputs.append(attend(query[:, :, prefix], prefix_key, prefix_value, is_causal=True))
            for block in blocks:
                block_key = torch.cat([prefix_key, key[:, :, block.tokens]], dim=2)
                block_value = torch.cat([prefix_value, value[:, :, block.tokens]], dim=2)
                outputs.append(attend(query[:, :, block.tokens], block_key, block_value, attn_mask=block.mask))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _branch_blocks(start: int, group: GroupLayout, dtype: torch.dtype, device: torch.device) -> list[_BranchBlock]:
    blocks: list[list[int]] = []
    for length in group.branch_lens:
        if not blocks or sum(blocks[-1]) + length > BRANCH_BLOCK:
            blocks.append([])
        blocks[-1].append(length)
    first, result = start + group.prompt_len, []
    for lengths in blocks:
        mask = _branch_mask(group.prompt_len, torch.tensor(lengths, device=device), dtype)
        result.append(_BranchBlock(slice(first, first + sum(lengths)), mask))
        first += sum(lengths)
    return result


def _branch_mask(prompt_len: int, branch_lens: Tensor, dtype: torch.dtype) -> Tensor:
    branch = torch.repeat_interleave(branch_lens)
    index = torch.arange(len(branch), device=branch.device)
    own = (branch[:, None] == branch[None, :]) & (index[:, None] >= index[None, :])
    visible = torch.cat([own.new_ones(len(branch), prompt_len), own], dim=1)
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))

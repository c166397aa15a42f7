"""How packed rows and the vision tower attend, registered through transformers' attention interface.

What a text layer attends to travels as the extra keyword `packed_attention` of the language model's forward: an
object that knows the layout of the row. Without it the registered function is transformers' own SDPA attention, so
that a model prepared here still runs plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tempsamp_fast.config import AttentionCore
from tempsamp_fast.model.flex_attention import FlexAttention
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.linear_layers import Recurrence, TreeRecurrence, use_packed_recurrence
from tempsamp_fast.model.split_attention import SplitAttention, attend_windows
from tempsamp_fast.model.varlen_attention import FLASH_DTYPES, VarlenAttention, varlen_kernel

TEXT_ATTENTION = "tempsamp_packed"
# transformers hands the vision tower's whole sequence over in one call only to names that contain "flash".
VISION_ATTENTION = "tempsamp_vision_flash"


class PackedAttention(Protocol):
    """How the tokens of one forward pass attend, in every text layer that does."""

    @property
    def recurrence(self) -> Recurrence:
        """What linear layers do in place of attending."""

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [B, heads, N, dim], key and value [B, kv_heads, N, dim] -> [B, N, heads, dim]."""


class PrefillAttention:
    """The attention of a row of prompts, keeping what every layer hands on: keys and values, or states."""

    def __init__(self, layout: Sequence[GroupLayout], attention: PackedAttention) -> None:
        self.layout = tuple(layout)
        self._attention = attention
        assert isinstance(attention.recurrence, TreeRecurrence)
        self.recurrence = attention.recurrence
        self.recurrence.keep = True
        self.keys: dict[int, Tensor] = {}
        """By layer that attends: [1, kv_heads, N, dim]."""
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        # A checkpointed layer comes by a second time, in the backward pass.
        self.keys.setdefault(layer_index, key)
        self.values.setdefault(layer_index, value)
        return self._attention(layer_index, query, key, value, scaling)


def packed_attention(
    layout: Sequence[GroupLayout], *, dtype: torch.dtype, device: torch.device, core: AttentionCore = "auto"
) -> PackedAttention:
    """The attention of a packed row. "auto" is one varlen flash call where that runs, SDPA calls elsewhere.

    Raises ValueError for an unknown core, and for "varlen" without a kernel.
    """
    if core == "auto":
        core = "varlen" if _runs_flash(device, dtype) and varlen_kernel() is not None else "split"
    if core == "split":
        return SplitAttention(layout, dtype=dtype, device=device)
    if core == "flex":
        return FlexAttention(layout, device=device)
    if core != "varlen":
        raise ValueError(f"attention core {core!r} is unknown; choose auto, split, varlen or flex")
    kernel = varlen_kernel()
    if kernel is None:
        raise ValueError("attention core 'varlen' needs flash-attn or torch.nn.attention.varlen; choose split or flex")
    return VarlenAttention(layout, device=device, kernel=kernel)


def check_attention_core(core: AttentionCore, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError where a model of this dtype cannot be trained with the core on the device."""
    if core == "flex" and device.type != "cuda":
        raise ValueError(f"attention_core='flex': needs a CUDA GPU to train, not {device.type}; choose auto or split")
    if core == "varlen" and not _runs_flash(device, dtype):
        raise ValueError(
            f"attention_core='varlen': needs a CUDA GPU and bfloat16, not {device.type} and {str(dtype)[6:]}; "
            "choose auto or split"
        )


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch the text layers and the vision tower of `model` to this module's attention, and linear layers too."""
    use_packed_recurrence(model)
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


def text_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' SDPA mask, and none where a plain causal row needs none.

    transformers leaves it out by itself, but for releases up to 5.17 while a CUDA graph is recorded.
    """
    if attention_mask is None and allow_is_causal_skip and q_length in (1, kv_length):
        return None
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def vision_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' flash contract: [1, heads, N, dim] in, full attention inside each window."""
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    kernel = varlen_kernel() if _runs_flash(query.device, query.dtype) else None
    if kernel is None:
        return attend_windows(query, key, value, cu_seq_lens_q, scaling)[None], None
    cu, longest = cu_seq_lens_q, max_length_q
    return kernel(query, key, value, cu, cu, longest, longest, scale=scaling, causal=False)[None], None


def _runs_flash(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in FLASH_DTYPES


AttentionInterface.register(TEXT_ATTENTION, text_attention)
# Without a mask function of its own, a registered attention never sees the padding mask of a plain forward.
AttentionMaskInterface.register(TEXT_ATTENTION, text_mask)
AttentionInterface.register(VISION_ATTENTION, vision_attention)

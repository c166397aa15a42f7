"""The model as the trainer calls it: a packed row in, hidden states of the predicted tokens out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from tempsamp_fast.attention import PackedAttention, SplitAttention, use_packed_attention
from tempsamp_fast.packing import PackedRow

SUPPORTED = (Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration)

Head = Callable[[Tensor, Tensor], Any]
"""(hidden [M, hidden_size], lm_head weight [vocab_size, hidden_size]) -> whatever the caller wants of them."""


class PolicyInput(Protocol):
    """What a forward pass reads; `PackedRow` is one."""

    @property
    def input_ids(self) -> Tensor:
        """[B, N] int64."""

    @property
    def position_ids(self) -> Tensor:
        """[3, B, N] int64."""

    @property
    def logit_indices(self) -> Tensor:
        """[M] int64 into the flattened [B * N] tokens."""


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower gives the language model for the videos of a row."""

    embeds: Tensor
    """[num_placeholders, hidden_size]."""
    deepstack: tuple[Tensor, ...] = ()
    """One [num_placeholders, hidden_size] per early decoder layer; empty for Qwen2.5-VL."""


class Policy(nn.Module):
    """A Qwen2.5-VL or Qwen3-VL model over packed rows.

    Everything that touches a parameter happens inside `forward`, so that an engine which gathers parameters around
    the outermost forward (ZeRO-3) sees every use of them, tied weights included.

    model: a transformers model of a supported class, or such a model wrapped by PEFT.
    gradient_checkpointing: recompute decoder layers and vision blocks in the backward pass (training mode only).
    Raises ValueError for a model whose attention cannot be packed.
    """

    def __init__(self, model: nn.Module, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        check_architecture(self.base_model)
        use_packed_attention(self.base_model)
        _set_checkpointing(self.base_model.model.language_model.layers, gradient_checkpointing)
        _set_checkpointing(self.base_model.model.visual.blocks, gradient_checkpointing)

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model itself, without a PEFT wrapper."""
        unwrap = getattr(self.model, "get_base_model", None)
        return cast(PreTrainedModel, unwrap() if callable(unwrap) else self.model)

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.base_model.config

    def forward(
        self,
        row: PolicyInput,
        head: Head | None = None,
        *,
        vision: VisionFeatures | None = None,
        attention: PackedAttention | None = None,
    ) -> Any:
        """Hidden states [M, hidden_size] at `row.logit_indices`, or `head` of them.

        head: called inside this forward with the hidden states and the output embedding.
        vision: features of the row's videos, when they are at hand (a frozen tower's, say).
        attention: how the tokens attend; by default as the layout of a `PackedRow` says.
        """
        hidden = self._hidden_states(row, vision, attention).flatten(0, 1)[row.logit_indices]
        return hidden if head is None else head(hidden, self.base_model.lm_head.weight)

    def encode_videos(self, row: PackedRow) -> VisionFeatures:
        """Run the vision tower on the row's videos; without a graph when the tower is frozen."""
        visual = self.base_model.model.visual
        frozen = not any(parameter.requires_grad for parameter in visual.parameters())
        with torch.no_grad() if frozen else nullcontext():
            output = visual(row.pixel_values.to(visual.dtype), grid_thw=row.video_grid_thw)
        return VisionFeatures(output.pooler_output, tuple(getattr(output, "deepstack_features", ())))

    def _hidden_states(
        self, row: PolicyInput, vision: VisionFeatures | None, attention: PackedAttention | None
    ) -> Tensor:
        model = self.base_model.model
        embeds = model.get_input_embeddings()(row.input_ids)
        if vision is None and isinstance(row, PackedRow) and len(row.video_grid_thw):
            vision = self.encode_videos(row)
        deepstack = {}
        if vision is not None:
            is_video = row.input_ids == self.config.video_token_id
            embeds = embeds.masked_scatter(is_video[..., None], vision.embeds.to(embeds.dtype))
            if vision.deepstack:
                deepstack = {"visual_pos_masks": is_video, "deepstack_visual_embeds": list(vision.deepstack)}
        if attention is None:
            assert isinstance(row, PackedRow), "only a PackedRow says by itself how its tokens attend"
            attention = SplitAttention(row.layout, dtype=embeds.dtype, device=embeds.device)
        return model.language_model(
            inputs_embeds=embeds,
            position_ids=row.position_ids,
            use_cache=False,
            packed_attention=attention,
            **deepstack,
        ).last_hidden_state


def check_architecture(model: nn.Module) -> None:
    """Raise ValueError naming what of `model` packed rows do not support."""
    if not isinstance(model, SUPPORTED):
        names = ", ".join(supported.__name__ for supported in SUPPORTED)
        raise ValueError(f"model class {type(model).__name__} is not supported; choose one of {names}")
    text: Any = model.config.text_config
    if getattr(text, "use_sliding_window", False):
        raise ValueError(f"use_sliding_window=True (sliding_window={text.sliding_window}) is not supported")
    other_layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if other_layers:
        raise ValueError(f"layer_types {sorted(other_layers)} are not supported; only full_attention is")
    if text.attention_dropout:
        raise ValueError(f"attention_dropout={text.attention_dropout} is not supported; set it to 0")


def _set_checkpointing(layers: Iterable[Any], enabled: bool) -> None:
    """transformers' `GradientCheckpointingLayer` reads these two attributes, and keeps keyword arguments."""
    for layer in layers:
        layer.gradient_checkpointing = enabled
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

"""The model as the trainer calls it: a packed row in, hidden states of the predicted tokens out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tempsamp_fast.batch import VideoPatches, VisionFeatures
from tempsamp_fast.config import AttentionCore
from tempsamp_fast.config.setting import require
from tempsamp_fast.model.attention import PackedAttention, PrefillAttention, packed_attention, use_packed_attention
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import PackedRow, idle_video
from tempsamp_fast.model.sequence_parallel import Shares, UlyssesAttention, exchange_features
from tempsamp_fast.model.split_attention import BranchAttention, KeptNodes
from tempsamp_fast.model.vision_tower import prepare_tower, run_tower
from tempsamp_fast.system.device import sent

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


class Policy(nn.Module):
    """A model of a supported family over packed rows.

    Everything that touches a parameter happens inside `forward`, so that an engine which gathers parameters around
    the outermost forward (ZeRO-3) sees every use of them, tied weights included.

    model: a transformers model of a supported class, or such a model wrapped by PEFT.
    gradient_checkpointing: recompute decoder layers and vision blocks in the backward pass (training mode only).
    checkpoint_every: of the decoder layers, only every k-th.
    checkpoint_vision: whether vision blocks are among them.
    attention_core: see `packed_attention`.
    Raises ValueError for a model whose attention cannot be packed, and for checkpoint_every below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        gradient_checkpointing: bool = False,
        checkpoint_every: int = 1,
        checkpoint_vision: bool = True,
        attention_core: AttentionCore = "auto",
    ) -> None:
        super().__init__()
        require(checkpoint_every >= 1, "checkpoint_every", checkpoint_every, "at least 1")
        self.model = model
        self.attention_core = attention_core
        check_architecture(self.base_model)
        use_packed_attention(self.base_model)
        prepare_tower(self.base_model)
        for index, layer in enumerate(self.base_model.model.language_model.layers):
            _set_checkpointing(layer, gradient_checkpointing and index % checkpoint_every == 0)
        for block in self.base_model.model.visual.blocks:
            _set_checkpointing(block, gradient_checkpointing and checkpoint_vision)
        self.train()  # `from_pretrained` leaves a model in evaluation mode, in which nothing is recomputed

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
        self, row: PolicyInput | VideoPatches, head: Head | None = None, *, attention: PackedAttention | None = None
    ) -> Any:
        """Hidden states [M, hidden_size] at `row.logit_indices`, or `head` of them; of a video alone, its features.

        Of a rank's share of a row (`row.shares`) those that predict its own answers; its group's ranks pass together.

        head: called inside this forward with the hidden states and the output embedding.
        attention: how the tokens attend; by default as the layout of a `PackedRow` says.
        """
        if isinstance(row, VideoPatches):
            return self.encode_videos(row.pixel_values, torch.tensor([row.grid_thw]))
        embeds, deepstack = self._embed(row)
        if isinstance(row, PackedRow) and row.stages:
            hidden = self._run_in_stages(row, embeds, deepstack)
        else:
            if attention is None:
                assert isinstance(row, PackedRow), "only a PackedRow says by itself how its tokens attend"
                attention = self._core(row.layout, embeds)
                attention = UlyssesAttention(attention, row.shares) if row.shares else attention
            hidden = self._run_text(embeds, row.position_ids, attention, deepstack)
        if isinstance(row, PackedRow) and row.idle_stages:
            hidden = torch.cat([hidden, *self._idle_stages(row, embeds)], dim=1)
        if isinstance(row, PackedRow) and row.shares:
            hidden = row.shares.hidden(hidden[0])
        else:
            hidden = hidden.flatten(0, 1)[row.logit_indices]
        return hidden if head is None else head(hidden, self.base_model.lm_head.weight)

    def encode_videos(self, pixel_values: Tensor, video_grid_thw: Tensor) -> VisionFeatures:
        """Run the vision tower, without a graph when it is frozen; arguments as of `run_tower`."""
        with torch.no_grad() if self.has_frozen_tower else nullcontext():
            output = run_tower(self.base_model, pixel_values, video_grid_thw)
        return VisionFeatures(output.pooler_output, tuple(getattr(output, "deepstack_features", ())))

    @property
    def has_frozen_tower(self) -> bool:
        """Whether no parameter of the vision tower is trained."""
        return not any(parameter.requires_grad for parameter in self.base_model.model.visual.parameters())

    def _embed(self, row: PolicyInput) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings [B, N, hidden_size] with the videos in place, and the keywords that carry deepstack features."""
        embeds = self.base_model.model.get_input_embeddings()(row.input_ids)
        if not isinstance(row, PackedRow) or not len(row.video_grid_thw):
            return embeds, {}
        if row.shares:
            vision = row.vision or self._encode_share(row, row.shares)
            places = sent(row.shares.places, embeds.device)
        else:
            vision = row.vision or self.encode_videos(row.pixel_values, row.video_grid_thw)
            # Sorted, not searched: how many there are is known, and nothing waits for the device to count them.
            is_video = row.input_ids[0] == self.config.video_token_id
            places = is_video.byte().argsort(descending=True, stable=True)[: len(vision.embeds)]
        embeds = embeds.index_copy(1, places, vision.embeds.to(embeds.dtype)[None])
        if not vision.deepstack:
            return embeds, {}
        return embeds, {"visual_pos_masks": places, "deepstack_visual_embeds": list(vision.deepstack)}

    def _encode_share(self, row: PackedRow, shares: Shares) -> VisionFeatures:
        """Features of the placeholders among this rank's tokens; without frames it passes the tower all the same."""
        if len(shares.grids):
            features = self.encode_videos(row.pixel_values, shares.grids)
        else:
            video = idle_video(self.config)
            pixels = video.pixel_values.to(row.input_ids.device)
            features = self.encode_videos(pixels, torch.tensor([video.grid_thw])).map(lambda tensor: tensor[:0])
        return exchange_features(features, shares.features)

    def _run_text(
        self, embeds: Tensor, position_ids: Tensor, attention: PackedAttention, deepstack: dict[str, Any] | None = None
    ) -> Tensor:
        """[B, N, hidden_size] after the last norm."""
        return self.base_model.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            use_cache=False,
            packed_attention=attention,
            **(deepstack or {}),
        ).last_hidden_state

    def _run_in_stages(self, row: PackedRow, embeds: Tensor, deepstack: dict[str, Any]) -> Tensor:
        """The root once, then stage after stage of nodes against the keys, values and states of those before.

        A stage's activations are dropped and recomputed when its turn comes in the backward pass, so that one stage at
        a time is held beside the root's; the gradients of all meet in what they continue.
        """
        (tree,) = row.layout
        last_parent = max(node.path[-1] for node in tree.nodes[1:])
        kept, outputs, first = KeptNodes(), list[Tensor](), 0
        for number in row.stages:
            nodes = tree.nodes[first : first + number]
            tokens = slice(nodes[0].start, nodes[-1].start + nodes[-1].length)
            stage = embeds[:, tokens], row.position_ids[..., tokens]
            layout = [GroupLayout(node.length, ()) for node in nodes]
            attention = BranchAttention(nodes, kept) if first else self._core(layout, embeds)
            if first <= last_parent:
                attention = prefill = PrefillAttention(layout, attention)
            if first:
                outputs.append(checkpoint(self._run_text, *stage, attention, use_reentrant=False))
            else:
                outputs.append(self._run_text(*stage, attention, deepstack))
            if first <= last_parent:
                kept.add([node.length for node in nodes], prefill.keys, prefill.values, prefill.recurrence.after)
            first += number
        return torch.cat(outputs, dim=1)

    def _idle_stages(self, row: PackedRow, embeds: Tensor) -> list[Tensor]:
        """Passes over the first token of the row, whose gradients are 0."""
        token = embeds[:, :1], row.position_ids[..., :1], self._core([GroupLayout(1, ())], embeds)
        return [checkpoint(self._run_text, *token, use_reentrant=False) for _ in range(row.idle_stages)]

    def _core(self, layout: Sequence[GroupLayout], embeds: Tensor) -> PackedAttention:
        return packed_attention(layout, dtype=embeds.dtype, device=embeds.device, core=self.attention_core)


def check_architecture(model: Any) -> None:
    """Raise ValueError naming what of `model` packed rows do not support."""
    family = next((each for each in FAMILIES.values() if isinstance(model, each.model_class)), None)
    if family is None:
        names = ", ".join(each.model_class.__name__ for each in FAMILIES.values())
        raise ValueError(f"model class {type(model).__name__} is not supported; choose one of {names}")
    if not isinstance(model.lm_head, nn.Linear):  # only its own weight reaches the loss
        raise ValueError(f"lm_head is a {type(model.lm_head).__name__}: adapters on the head are not supported")
    text: Any = model.config.text_config
    if getattr(text, "use_sliding_window", False):
        raise ValueError(f"use_sliding_window=True (sliding_window={text.sliding_window}) is not supported")
    other_layers = set(getattr(text, "layer_types", None) or ()) - family.layer_types
    if other_layers:
        raise ValueError(
            f"layer_types {sorted(other_layers)} are not supported; only {', '.join(sorted(family.layer_types))} is"
        )
    if getattr(text, "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True is not supported: its auxiliary loss averages over the tokens of a row, where a "
            "prompt counts once for all of its answers; set it to False"
        )
    if text.attention_dropout:
        raise ValueError(f"attention_dropout={text.attention_dropout} is not supported; set it to 0")


def _set_checkpointing(layer: Any, enabled: bool) -> None:
    """transformers' `GradientCheckpointingLayer` reads these two attributes, and keeps keyword arguments."""
    layer.gradient_checkpointing = enabled
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

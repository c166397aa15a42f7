"""Decays of linear layers in float32 beside bfloat16 weights: rounded, a state would be forgotten at another rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempsamp_fast.model.linear_layers import DECAYS, UNROUNDED, linear_layers

Decay = tuple[nn.Module, str, Tensor]
"""A linear layer, which of its `DECAYS`, and the values [heads] in float32."""


def decays_of(policy: nn.Module) -> list[Decay]:
    """As they were loaded, before DeepSpeed rounds them; none that ZeRO-3 partitioned, and so rounded, already."""
    found = [(layer, name, getattr(layer, name)) for layer in linear_layers(policy) for name in DECAYS]
    return [(layer, name, each.detach().float().clone()) for layer, name, each in found if not hasattr(each, "ds_id")]


def keep_decays(engine: Any, loaded: list[Decay]) -> None:
    """Begin the optimizer of a bfloat16 engine with these values, and hand them to the layers; called by every rank."""
    from deepspeed.utils import safe_set_full_fp32_param

    for layer, name, value in loaded:
        parameter = getattr(layer, name)
        value = value.to(parameter.device)
        if hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, value)
        elif not parameter.requires_grad:
            layer.register_buffer(name + UNROUNDED, value, persistent=False)
    follow_optimizer(engine)


def follow_optimizer(engine: Any) -> None:
    """Hand the layers what the optimizer has of their decays in float32; called by every rank once it has changed."""
    from deepspeed.utils import safe_get_full_fp32_param

    for layer in linear_layers(engine.module):
        for name in DECAYS:
            parameter = getattr(layer, name)
            if parameter.requires_grad and parameter.dtype == torch.bfloat16:
                value = safe_get_full_fp32_param(parameter)
                if value is not None:
                    layer.register_buffer(name + UNROUNDED, value.detach().clone(), persistent=False)


def with_decays(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The weights of `model` as they are to be saved: `state`, its own by default, decays in float32 where kept so."""
    kept = {name.removesuffix(UNROUNDED): each for name, each in model.named_buffers() if name.endswith(UNROUNDED)}
    if not kept:
        return state
    state = model.state_dict() if state is None else state
    return state | {name: value.cpu() for name, value in kept.items() if name in state}

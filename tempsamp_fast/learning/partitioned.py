"""Weights that ZeRO-3 partitions over ranks: loaded so, gathered while a rollout draws, collected for a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempsamp_fast.config import TrainConfig
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config
from tempsamp_fast.model.linear_layers import linear_layers
from tempsamp_fast.system.ranks import is_first_rank

Forward = Callable[..., Any]
"""`(row, head) -> head(hidden, weight)`, as of `Policy`."""


def gather_with_their_readers(policy: nn.Module) -> None:
    """Have ZeRO-3 gather weights that are read outside of their own module's forward; before its engine is built."""
    import deepspeed

    for layer in linear_layers(policy):
        deepspeed.zero.register_external_parameter(layer, layer.conv1d.weight)


@contextmanager
def partitioned_loading(train: TrainConfig, dtype: torch.dtype) -> Iterator[None]:
    """Under ZeRO stage 3 `from_pretrained` inside partitions each parameter as it is made: no rank holds all."""
    settings = deepspeed_config(train, dtype)
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.core_model_loading import Transpose
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept_alive = HfDeepSpeedConfig(settings)  # transformers finds it through a weak reference
    operation: Any = Transpose
    turn = operation.convert
    try:
        operation.convert = lambda *args, model, **options: turn(*args, model=_WholeShapes(model), **options)
        yield
    finally:
        operation.convert = turn
        unset_hf_deepspeed_config()
        del kept_alive


@dataclass(frozen=True)
class _WholeShapes:
    """A model as transformers asks it whether a stored weight lies turned: by shape, which partitioned ones hide."""

    model: nn.Module

    def get_parameter(self, name: str) -> Tensor:
        parameter = self.model.get_parameter(name)
        return torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")


def is_partitioned(module: nn.Module) -> bool:
    """Whether each rank holds only a part of every parameter (ZeRO stage 3)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def forward_of(engine: Any) -> Forward:
    """The policy of an engine, or the engine itself where only that can gather partitioned parameters."""
    return engine if engine.zero_optimization_partition_weights() else engine.module


@contextmanager
def gathered(engine: Any) -> Iterator[nn.Module]:
    """The policy of a ZeRO-3 engine with all weights whole on every rank, gathered once and released on leaving.

    DeepSpeed's hooks are off meanwhile: passes through it meet no collective, and ranks need not be in step. Weights
    may not be changed. Entered by every rank.
    """
    import deepspeed

    offload = engine.optimizer.parameter_offload
    offload.partition_all_parameters()  # also what a pass has gathered ahead and nobody used
    with deepspeed.zero.GatheredParameters(engine.module.parameters()), _without_hooks(offload):
        yield engine.module


@contextmanager
def _without_hooks(offload: Any) -> Iterator[None]:
    """Modules without the hooks by which ZeRO-3 gathers; all come back in their order."""
    handles = [offload.fwd_pre_hook, *offload.forward_hooks, *offload.backward_hooks]
    hooks_of = {id(hooks): hooks for handle in handles if (hooks := handle.hooks_dict_ref()) is not None}
    before = {key: list(hooks.items()) for key, hooks in hooks_of.items()}
    for handle in handles:
        handle.hooks_dict_ref().pop(handle.id)
    try:
        yield
    finally:
        for key, hooks in hooks_of.items():
            hooks.clear()
            hooks.update(before[key])


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The state of `module` on the CPU of rank 0, parameters gathered one by one; called by every rank.

    Empty on the other ranks. Tied parameters stay tied.
    """
    import deepspeed

    is_first = is_first_rank()
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            with deepspeed.zero.GatheredParameters([tensor]):
                whole[id(tensor)] = tensor.detach().to("cpu", copy=True) if is_first else tensor.new_empty(0)
        if is_first:
            state[name] = whole[id(tensor)]
    return state

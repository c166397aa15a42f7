"""The frozen policy of a run's KL term: made before its first reinforcement step, kept for resuming.

It is a copy, or the policy itself without what its adapters learned since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.config import DataConfig, ModelConfig, TrainConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config
from tempsamp_fast.learning.partitioned import (
    Forward,
    forward_of,
    gather_with_their_readers,
    is_partitioned,
    partitioned_loading,
)
from tempsamp_fast.model.loading import load_model
from tempsamp_fast.model.lora import as_reference, remember_reference
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.run.checkpoint import check_reference, save_reference

FOLDER = "reference"


def reference_of(
    run: Path, engine: Any, chat: Chat, model: ModelConfig, data: DataConfig, train: TrainConfig, is_first: bool
) -> Forward:
    """The policy of `engine` as it was before its first reinforcement step (`is_first`: as it is now).

    A copy lies in RUN/reference; with adapters the model itself is its reference without what they learned since.
    Called by every rank. Raises ValueError where the copy is missing or broken.
    """
    if model.lora_rank:
        if is_first:
            remember_reference(engine.module.model)
        return adapter_reference(engine)
    folder = run / FOLDER
    if is_first:
        save_reference(folder, engine.module, chat, data)
    else:
        check_reference(folder)
    dtype = engine.module.base_model.dtype
    with partitioned_loading(train, dtype):
        kept, _ = load_model(str(folder), model, dtype)
    return frozen_reference(Policy(kept, attention_core=model.attention_core), train, dtype, engine.device)


def frozen_reference(policy: Policy, train: TrainConfig, dtype: torch.dtype, device: torch.device) -> Forward:
    """`policy` made ready to be asked only; partitioned over the ranks like the one that learns."""
    policy.requires_grad_(False).eval()
    if not is_partitioned(policy):
        return policy.to(device)
    import deepspeed

    settings = deepspeed_config(train, dtype)
    del settings["optimizer"]
    settings["zero_optimization"].pop("offload_optimizer", None)
    gather_with_their_readers(policy)
    engine, *_ = deepspeed.initialize(model=policy, config=settings)
    engine.eval()
    return engine


def adapter_reference(engine: Any) -> Forward:
    """The trained model without its adapters, or with those it had before reinforcement learning: no second copy."""
    forward = forward_of(engine)

    def ask(row: Any, head: Any) -> Any:
        with as_reference(engine.module.model):
            return forward(row, head)

    return ask

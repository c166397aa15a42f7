"""The frozen policy that the KL term compares with: a copy, or the policy itself without what its adapters learned."""

from __future__ import annotations

from typing import Any

import torch

from tempsamp_fast.config import TrainConfig
from tempsamp_fast.learning.engine import Forward, deepspeed_config, forward_of, is_partitioned
from tempsamp_fast.model.lora import as_reference
from tempsamp_fast.model.policy import Policy


def frozen_reference(policy: Policy, train: TrainConfig, dtype: torch.dtype, device: torch.device) -> Forward:
    """`policy` made ready to be asked only; partitioned over the ranks like the one that learns."""
    policy.requires_grad_(False).eval()
    if not is_partitioned(policy):
        return policy.to(device)
    import deepspeed

    settings = {name: value for name, value in deepspeed_config(train, dtype).items() if name != "optimizer"}
    settings["zero_optimization"] = {
        name: value for name, value in settings["zero_optimization"].items() if name != "offload_optimizer"
    }
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

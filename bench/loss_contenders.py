"""One clipped GRPO loss with a k3 penalty, mean over tokens, by the ways trainers compute it from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from tempsamp_kernels import fused_linear_grpo_loss
from torch import Tensor
from torch.nn import functional
from trl.kernels import ChunkedLogProbFunction

EPSILON, BETA = 0.2, 0.04


@dataclass(frozen=True)
class LossBatch:
    """Inputs of B completions of N / B tokens each."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]."""
    token_ids: Tensor
    """[N] int64."""
    advantages: Tensor
    """[B] float32."""
    old_logps: Tensor
    """[N] float32."""
    ref_logps: Tensor
    """[N] float32."""

    @property
    def num_rows(self) -> int:
        return len(self.advantages)

    @property
    def length(self) -> int:
        return len(self.token_ids) // self.num_rows

    def by_row(self, values: Tensor) -> Tensor:
        """[N, ...] -> [B, N / B, ...]."""
        return values.unflatten(0, (self.num_rows, self.length))


Contender = Callable[[LossBatch], Tensor]


def torch_loss(logps: Tensor, batch: LossBatch) -> Tensor:
    """The loss of log-probs [N] in plain PyTorch: what TRL does with them."""
    advantages = batch.advantages.repeat_interleave(batch.length)
    ratio = (logps - batch.old_logps).exp()
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    delta = batch.ref_logps - logps
    return (policy + BETA * (torch.expm1(delta) - delta)).mean()


def ours(batch: LossBatch) -> Tensor:
    row_ids = torch.arange(batch.num_rows, device=batch.hidden.device).repeat_interleave(batch.length)
    return fused_linear_grpo_loss(
        batch.hidden,
        batch.weight,
        batch.token_ids,
        row_ids,
        advantages=batch.advantages,
        old_logps=batch.old_logps,
        ref_logps=batch.ref_logps,
        loss_type="dapo",
        beta=BETA,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
    )[0]


def trl_logps(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, 32768, None, 1.0, ())[0]


def trl(batch: LossBatch) -> Tensor:
    return torch_loss(trl_logps(batch.hidden, batch.weight, batch.token_ids), batch)


def liger_sm90(batch: LossBatch) -> Tensor:
    """Its CuTe kernels for Hopper (0.8.5), which need CUTLASS's Python package: ImportError without."""
    module = import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    nll = module.LigerFusedScaledCrossEntropySM90Function.apply(batch.hidden, batch.weight, batch.token_ids)
    return torch_loss(-nll, batch)


def quack(batch: LossBatch) -> Tensor:
    """Its cross entropy, which reads each row once by a cluster, over bf16 logits of cuBLAS: ImportError without it."""
    cross_entropy = import_module("quack.cross_entropy").cross_entropy
    logits = functional.linear(batch.hidden, batch.weight)
    return torch_loss(-cross_entropy(logits, batch.token_ids, reduction="none", inplace_backward=True), batch)


def liger(batch: LossBatch) -> Tensor:
    # Off the GPU only its loss arithmetic would be compiled, which is nothing beside the head.
    compiled = batch.hidden.is_cuda
    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, epsilon_low=EPSILON, epsilon_high=EPSILON)
    return loss(
        batch.by_row(batch.hidden),
        batch.weight,
        batch.by_row(batch.token_ids),
        torch.ones(batch.num_rows, batch.length, device=batch.hidden.device),
        batch.advantages,
        old_per_token_logps=batch.by_row(batch.old_logps),
        ref_per_token_logps=batch.by_row(batch.ref_logps),
    )[0]

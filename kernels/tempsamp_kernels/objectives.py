"""What is done with a token's log-probability: policy objectives and KL estimators, each as a Triton and a torch twin.

Every objective maps `(logp, log_ratio, advantage, lower, upper, first, second)` to
`(loss, d loss / d logp, d loss / d log_ratio)`. The two derivatives stay apart because a sequence-level ratio spreads
the second one over its whole row; at token level the gradient is their sum. `lower` and `upper` bound the ratio (and
define the clip metrics), `first` and `second` belong to the objective: see `ratio_bounds`.

Every KL estimator maps `(delta, log_ratio)`, `delta = ref - logp`, to `(kl, d kl / d logp, d kl / d log_ratio)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

UNBOUNDED = 1e30
"""A bound that nothing reaches; finite, for infinity times an advantage of 0 is no number."""
SELF = inf
"""In old or reference log-probs: stands for a detached copy of the current one (ratio 1, KL 0)."""


def clipped(logp, log_ratio, advantage, lower, upper, cap, dual):
    """PPO's pessimistic clip (arXiv 1707.06347) with INTELLECT-2's `cap` (2505.07291) and `dual` clip (1912.09729)."""
    ratio = log_ratio.exp()
    surrogate = ratio.clamp(max=cap) * advantage
    clipped_surrogate = ratio.clamp(lower, upper) * advantage
    takes_clipped = clipped_surrogate < surrogate
    loss = -torch.minimum(surrogate, clipped_surrogate)
    moves = torch.where(takes_clipped, (ratio >= lower) & (ratio <= upper), ratio <= cap)
    is_bounded = (advantage < 0) & (loss > -dual * advantage)
    loss = torch.where(is_bounded, -dual * advantage, loss)
    return loss, torch.zeros_like(loss), torch.where(moves & ~is_bounded, -ratio * advantage, 0.0)


@triton.jit
def clipped_triton(logp, log_ratio, advantage, lower, upper, cap, dual):
    ratio = tl.exp(log_ratio)
    surrogate = tl.minimum(ratio, cap) * advantage
    clipped_surrogate = tl.minimum(tl.maximum(ratio, lower), upper) * advantage
    takes_clipped = clipped_surrogate < surrogate
    loss = -tl.minimum(surrogate, clipped_surrogate)
    moves = tl.where(takes_clipped, (ratio >= lower) & (ratio <= upper), ratio <= cap)
    is_bounded = (advantage < 0) & (loss > -dual * advantage)
    loss = tl.where(is_bounded, -dual * advantage, loss)
    return loss, 0.0 * loss, tl.where(moves & (is_bounded == 0), -ratio * advantage, 0.0)


def weighted_likelihood(logp, log_ratio, advantage, lower, upper, cap, unused):
    """CISPO (arXiv 2506.13585): log-likelihood under a detached ratio, bounded from above only."""
    weight = log_ratio.exp().clamp(max=upper) * advantage
    return -weight * logp, -weight, torch.zeros_like(weight)


@triton.jit
def weighted_likelihood_triton(logp, log_ratio, advantage, lower, upper, cap, unused):
    weight = tl.minimum(tl.exp(log_ratio), upper) * advantage
    return -weight * logp, -weight, 0.0 * weight


def soft_gate(logp, log_ratio, advantage, lower, upper, temperature_pos, temperature_neg):
    """SAPO (arXiv 2511.20347): a sigmoid around ratio 1 in place of the clip, its temperature chosen by the sign."""
    ratio = log_ratio.exp()
    temperature = torch.where(advantage > 0, temperature_pos, temperature_neg)
    gate = torch.sigmoid(temperature * (ratio - 1))
    loss = -4 * gate / temperature * advantage
    return loss, torch.zeros_like(loss), -4 * gate * (1 - gate) * ratio * advantage


@triton.jit
def soft_gate_triton(logp, log_ratio, advantage, lower, upper, temperature_pos, temperature_neg):
    ratio = tl.exp(log_ratio)
    temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = tl.sigmoid(temperature * (ratio - 1))
    loss = -4 * gate / temperature * advantage
    return loss, 0.0 * loss, -4 * gate * (1 - gate) * ratio * advantage


def likelihood(logp, log_ratio, advantage, lower, upper, first, second):
    """Advantage-weighted log-likelihood: supervised fine-tuning where the advantage is 1."""
    return -advantage * logp, -advantage, torch.zeros_like(logp)


@triton.jit
def likelihood_triton(logp, log_ratio, advantage, lower, upper, first, second):
    return -advantage * logp, -advantage, 0.0 * logp


def k1(delta, log_ratio):
    return -delta, torch.ones_like(delta), torch.zeros_like(delta)


@triton.jit
def k1_triton(delta, log_ratio):
    return -delta, 1.0 + 0.0 * delta, 0.0 * delta


def k2(delta, log_ratio):
    return 0.5 * delta * delta, -delta, torch.zeros_like(delta)


@triton.jit
def k2_triton(delta, log_ratio):
    return 0.5 * delta * delta, -delta, 0.0 * delta


def k3(delta, log_ratio):
    growth = torch.expm1(delta)
    return growth - delta, -growth, torch.zeros_like(delta)


@triton.jit
def k3_triton(delta, log_ratio):
    # exp(delta) - 1 - delta loses every digit near 0; five terms of its series are exact in fp32 up to 1/8
    series = 0.5 * delta * delta * (1 + delta / 3 * (1 + delta / 4 * (1 + delta / 5 * (1 + delta / 6))))
    kl = tl.where(tl.abs(delta) < 0.125, series, tl.exp(delta) - 1 - delta)
    return kl, -(kl + delta), 0.0 * delta


def k3_corrected(delta, log_ratio):
    """k3 times the importance ratio (DeepSeek-V3.2): unbiased under the old policy's samples."""
    kl, d_logp, _ = k3(delta, log_ratio)
    ratio = log_ratio.exp()
    return kl * ratio, d_logp * ratio, kl * ratio


@triton.jit
def k3_corrected_triton(delta, log_ratio):
    kl, d_logp, _ = k3_triton(delta, log_ratio)
    ratio = tl.exp(log_ratio)
    return kl * ratio, d_logp * ratio, kl * ratio


@dataclass(frozen=True)
class Twins:
    """One function twice: on tensors, and inside a Triton kernel."""

    torch: Callable[..., tuple[Tensor, Tensor, Tensor]]
    triton: Any


OBJECTIVES = {
    "clipped": Twins(clipped, clipped_triton),
    "cispo": Twins(weighted_likelihood, weighted_likelihood_triton),
    "sapo": Twins(soft_gate, soft_gate_triton),
    "likelihood": Twins(likelihood, likelihood_triton),
}
KL_ESTIMATORS = {
    "k1": Twins(k1, k1_triton),
    "k2": Twins(k2, k2_triton),
    "k3": Twins(k3, k3_triton),
    "k3_corrected": Twins(k3_corrected, k3_corrected_triton),
}
OBJECTIVE_OF_LOSS_TYPE = {
    "grpo": "clipped",
    "bnpo": "clipped",
    "dr_grpo": "clipped",
    "dapo": "clipped",
    "luspo": "clipped",
    "cispo": "cispo",
    "sapo": "sapo",
    "vespo": "likelihood",
    "sft": "likelihood",
}


@dataclass(frozen=True)
class TokenLoss:
    """The objective, the KL estimator and their four numbers: everything that is the same for all tokens of a call."""

    objective: Twins
    kl: Twins
    bounds: tuple[float, float, float, float]
    """(lower, upper, first, second) of the objective."""


def token_loss(
    loss_type: str,
    kl_type: str = "k3",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
) -> TokenLoss:
    """Look up a loss type's objective and turn the user's options into its four numbers.

    Raises ValueError for an unknown `loss_type` or `kl_type`, and for an option out of range.
    """
    if loss_type not in OBJECTIVE_OF_LOSS_TYPE:
        raise ValueError(f"loss_type {loss_type!r} is not one of {sorted(OBJECTIVE_OF_LOSS_TYPE)}")
    if kl_type not in KL_ESTIMATORS:
        raise ValueError(f"kl_type {kl_type!r} is not one of {sorted(KL_ESTIMATORS)}")
    for name, value in (
        ("delta", delta),
        ("dual_clip", dual_clip),
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    objective = OBJECTIVE_OF_LOSS_TYPE[loss_type]
    bounds = {
        "clipped": (1 - epsilon_low, 1 + epsilon_high, delta or UNBOUNDED, dual_clip or UNBOUNDED),
        "cispo": (-UNBOUNDED, epsilon_high, UNBOUNDED, UNBOUNDED),
        "sapo": (-UNBOUNDED, UNBOUNDED, sapo_temperature_pos, sapo_temperature_neg),
        "likelihood": (-UNBOUNDED, UNBOUNDED, UNBOUNDED, UNBOUNDED),
    }[objective]
    lower, upper, first, second = map(float, bounds)  # an int would compile a kernel of its own
    return TokenLoss(OBJECTIVES[objective], KL_ESTIMATORS[kl_type], (lower, upper, first, second))

"""What is done with one token's log-probability: policy objectives, KL estimators and the loss made of the two.

Each is written once: `twin` makes a Triton and a torch function of it. An objective maps `(logp, log_ratio, advantage,
ratio_low, ratio_high, option_1, option_2)` to `(loss, d loss / d logp, d loss / d log_ratio)`. The two derivatives
stay apart because a ratio shared by a row spreads the second one over it; at token level the gradient is their sum.
`ratio_low` and `ratio_high` define the clip metrics, the options belong to the objective (see `token_loss`).
A KL estimator maps `(delta, log_ratio)`, `delta = ref - logp`, to `(kl, d kl / d logp, d kl / d log_ratio)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log, nan
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tempsamp_kernels.optional_triton import tl, triton

UNBOUNDED = 1e30
"""A bound that nothing reaches; finite, for infinity times an advantage of 0 is no number."""
SELF = inf
"""In old or reference log-probs: stands for a detached copy of the current one (ratio 1, KL 0)."""


@triton.jit
def least(a, b):
    """The smaller one, NaN where either is: a GPU's own minimum would drop the NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def most(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


_ON_TENSORS: dict[str, Any] = {
    "__builtins__": __builtins__,
    "tl": SimpleNamespace(exp=torch.exp, where=torch.where, abs=torch.abs, sigmoid=torch.sigmoid, constexpr=None),
    "least": lambda a, b: torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b),
    "most": lambda a, b: torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b),
}
"""What the names in a twin mean when it is called on tensors."""


def twin(function: Any) -> Any:
    """The function under `triton.jit`; the same code on torch tensors is `on_tensors(function)`."""
    code, name = function.__code__, function.__name__
    _ON_TENSORS[name] = FunctionType(code, _ON_TENSORS, name)
    return triton.jit(function)


def on_tensors(function: Any) -> Callable[..., Any]:
    """The torch twin of a function made by `twin`."""
    return _ON_TENSORS[function.__name__]


@twin
def clipped(logp, log_ratio, advantage, ratio_low, ratio_high, cap, dual):
    """PPO's pessimistic clip (arXiv 1707.06347) with INTELLECT-2's `cap` (2505.07291) and `dual` clip (1912.09729)."""
    ratio = tl.exp(log_ratio)
    surrogate = least(ratio, cap) * advantage
    clipped_surrogate = most(least(ratio, ratio_high), ratio_low) * advantage
    is_outside = (ratio < ratio_low) | (ratio > ratio_high)
    is_flat = tl.where(clipped_surrogate < surrogate, is_outside, ratio > cap)
    loss = -least(surrogate, clipped_surrogate)
    is_bounded = (advantage < 0) & (loss > -dual * advantage)
    loss = tl.where(is_bounded, -dual * advantage, loss)
    return loss, 0.0 * logp, tl.where(is_flat | is_bounded, 0.0, -ratio * advantage)


@twin
def weighted_likelihood(logp, log_ratio, advantage, ratio_low, ratio_high, option_1, option_2):
    """CISPO (arXiv 2506.13585): log-likelihood under a detached and bounded ratio."""
    weight = most(least(tl.exp(log_ratio), ratio_high), ratio_low) * advantage
    return -weight * logp, -weight, 0.0 * weight


@twin
def soft_gate(logp, log_ratio, advantage, ratio_low, ratio_high, temperature_pos, temperature_neg):
    """SAPO (arXiv 2511.20347): a sigmoid around ratio 1 in place of the clip, its temperature chosen by the sign."""
    ratio = least(tl.exp(log_ratio), 1e30)  # infinity times a closed gate is no number
    temperature = tl.where(advantage > 0, temperature_pos, temperature_neg)
    gate = tl.sigmoid(temperature * (ratio - 1))
    return -4 * gate / temperature * advantage, 0.0 * logp, -4 * gate * (1 - gate) * ratio * advantage


@twin
def likelihood(logp, log_ratio, advantage, ratio_low, ratio_high, option_1, option_2):
    """Advantage-weighted log-likelihood: supervised fine-tuning where the advantage is 1, VESPO under row weights."""
    return -advantage * logp, -advantage + 0.0 * logp, 0.0 * logp


@twin
def k1(delta, log_ratio):
    return -delta, 1.0 + 0.0 * delta, 0.0 * delta


@twin
def k2(delta, log_ratio):
    return 0.5 * delta * delta, -delta, 0.0 * delta


@twin
def k3(delta, log_ratio):
    # exp(delta) - 1 - delta loses every digit near 0; five terms of its series are exact in fp32 up to 1/8
    series = 0.5 * delta * delta * (1 + delta / 3 * (1 + delta / 4 * (1 + delta / 5 * (1 + delta / 6))))
    kl = tl.where(tl.abs(delta) < 0.125, series, tl.exp(delta) - 1 - delta)
    return kl, -(kl + delta), 0.0 * delta


@twin
def k3_corrected(delta, log_ratio):
    """k3 times the importance ratio (DeepSeek-V3.2): unbiased under the old policy's samples."""
    kl, d_logp, _ = k3(delta, log_ratio)
    ratio = tl.exp(log_ratio)
    return kl * ratio, d_logp * ratio, kl * ratio


@twin
def difference(logp, other):
    """`logp - other`, 0 where the other stands for `logp` itself (`SELF`)."""
    return tl.where(other == float("inf"), 0.0, logp - other)


@twin
def weighted(weight, value):
    """`weight * value`, 0 where the weight is: 0 times infinity is no number."""
    return tl.where(weight == 0, 0.0, weight * value)


@twin
def token_terms(
    logp,
    entropy,
    log_ratio,
    ref_logp,
    advantage,
    policy_weight,
    kl_weight,
    entropy_weight,
    entropy_threshold,
    ratio_low,
    ratio_high,
    option_1,
    option_2,
    log_ratio_bound,
    kl_bound,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
):
    """Everything about the loss of a token.

    Returns loss, KL, ratio, whether the ratio is below or above its bounds where that matters, and the derivatives of
    the loss with respect to log-prob, log-ratio and entropy. Differences of log-probs and the KL have no gradient
    beyond their bounds, policy and entropy terms none below the entropy threshold.
    """
    is_kept = ~(entropy < entropy_threshold)
    ratio_is_flat = tl.abs(log_ratio) > log_ratio_bound
    log_ratio = most(least(log_ratio, log_ratio_bound), -log_ratio_bound)
    ratio = tl.exp(log_ratio)
    loss, d_logp, d_log_ratio = OBJECTIVE(logp, log_ratio, advantage, ratio_low, ratio_high, option_1, option_2)
    policy_weight = tl.where(is_kept, policy_weight, 0.0)
    entropy_weight = tl.where(is_kept, entropy_weight, 0.0)

    delta = -difference(logp, ref_logp)
    delta_is_flat = tl.abs(delta) > log_ratio_bound
    delta = most(least(delta, log_ratio_bound), -log_ratio_bound)
    kl, kl_d_logp, kl_d_log_ratio = KL(delta, log_ratio)
    kl_is_flat = tl.abs(kl) > kl_bound
    kl = most(least(kl, kl_bound), -kl_bound)
    kl_d_logp = tl.where(kl_is_flat | delta_is_flat, 0.0, kl_d_logp)
    kl_d_log_ratio = tl.where(kl_is_flat, 0.0, kl_d_log_ratio)
    return (
        policy_weight * loss + weighted(kl_weight, kl) - entropy_weight * entropy,
        kl,
        ratio,
        tl.where((ratio < ratio_low) & (advantage < 0), 1.0, 0.0),
        tl.where((ratio > ratio_high) & (advantage > 0), 1.0, 0.0),
        policy_weight * d_logp + weighted(kl_weight, kl_d_logp),
        tl.where(ratio_is_flat, 0.0, policy_weight * d_log_ratio + weighted(kl_weight, kl_d_log_ratio)),
        -entropy_weight,
    )


OBJECTIVES = {"clipped": clipped, "cispo": weighted_likelihood, "sapo": soft_gate, "likelihood": likelihood}
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3_corrected": k3_corrected}
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


LEVELS = ("token", "sequence", "sequence_token")
"""What shares a ratio: nothing, a row (GSPO), or a row whose tokens keep gradients of their own (GSPO-token)."""


@dataclass(frozen=True)
class TokenLoss:
    """The objective, the KL estimator and their numbers: everything that is the same for all tokens of a call."""

    objective: str
    """Of `OBJECTIVES`."""
    kl: str
    """Of `KL_ESTIMATORS`."""
    ratio_low: float
    ratio_high: float
    option_1: float
    option_2: float
    log_ratio_bound: float
    kl_bound: float

    def numbers(self) -> dict[str, float]:
        """By parameter of `token_terms`."""
        names = ("ratio_low", "ratio_high", "option_1", "option_2", "log_ratio_bound", "kl_bound")
        return {name: getattr(self, name) for name in names}


def token_loss(
    loss_type: str,
    kl_type: str = "k3",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    cispo_low: float | None = None,
    log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
    level: str = "token",
) -> TokenLoss:
    """Look up a loss type's objective and turn the user's options into its numbers.

    Raises ValueError for an unknown `loss_type`, `kl_type` or `level`, for what a loss type does not have, and for an
    option out of range.
    """
    if loss_type not in OBJECTIVE_OF_LOSS_TYPE:
        raise ValueError(f"loss_type {loss_type!r} is not one of {sorted(OBJECTIVE_OF_LOSS_TYPE)}")
    if kl_type not in KL_ESTIMATORS:
        raise ValueError(f"kl_type {kl_type!r} is not one of {sorted(KL_ESTIMATORS)}")
    if level not in LEVELS:
        raise ValueError(f"importance_sampling_level {level!r} is not one of {LEVELS}")
    if level != "token" and loss_type in ("vespo", "sft"):
        raise ValueError(f"loss_type {loss_type!r} has no importance_sampling_level {level!r}")
    for name, value in (
        ("delta", delta),
        ("dual_clip", dual_clip),
        ("sapo_temperature_pos", sapo_temperature_pos),
        ("sapo_temperature_neg", sapo_temperature_neg),
        ("log_ratio_clamp", log_ratio_clamp),
        ("kl_clamp", kl_clamp),
    ):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high), ("cispo_low", cispo_low)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    objective = OBJECTIVE_OF_LOSS_TYPE[loss_type]
    takes = {"clipped": ("delta", "dual_clip"), "cispo": ("cispo_low",)}.get(objective, ())
    for name, value in {"delta": delta, "dual_clip": dual_clip, "cispo_low": cispo_low}.items():
        if value is not None and name not in takes:
            raise ValueError(f"loss_type {loss_type!r} takes no {name}; got {value}")
    if cispo_low is not None and cispo_low > epsilon_high:
        raise ValueError(f"cispo_low must be at most epsilon_high, {epsilon_high}; got {cispo_low}")
    numbers = {
        "clipped": (1 - epsilon_low, 1 + epsilon_high, delta or UNBOUNDED, dual_clip or UNBOUNDED),
        "cispo": (-UNBOUNDED if cispo_low is None else cispo_low, epsilon_high, 0.0, 0.0),
        "sapo": (-UNBOUNDED, UNBOUNDED, sapo_temperature_pos, sapo_temperature_neg),
        "likelihood": (-UNBOUNDED, UNBOUNDED, 0.0, 0.0),
    }[objective]
    # An int would compile a kernel of its own.
    floats = map(float, (*numbers, log_ratio_clamp or inf, kl_clamp or inf))
    return TokenLoss(objective, kl_type, *floats)


LOG_SMALLEST_WEIGHT = log(1e-8)


def bounded_log(weights: Tensor) -> Tensor:
    """Logarithm of importance weights, of 0 too."""
    return weights.float().log().clamp(LOG_SMALLEST_WEIGHT, 20.0)


@dataclass(frozen=True)
class Vespo:
    """Gamma weight of a row's importance ratio w: `w^k * exp(lambda * (1 - w))`, by the advantage's sign."""

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0
    log_weight: Tensor | float = 0.0
    """Added to the row's log-ratio: [B], or a number for all rows."""

    def weight(self, row_log_ratio: Tensor, advantage: Tensor) -> Tensor:
        log_w = row_log_ratio.clamp(LOG_SMALLEST_WEIGHT, 20.0)
        k = torch.where(advantage >= 0, self.k_pos, self.k_neg)
        rate = torch.where(advantage >= 0, self.lambda_pos, self.lambda_neg).clamp(min=1e-4)
        return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=nan, posinf=0.0)

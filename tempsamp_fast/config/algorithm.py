"""Advantages and loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tempsamp_fast.config.ranges import require

Shaping = Literal["grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl"]


@dataclass
class AlgorithmConfig:
    """Advantages and loss (paper section 3; defaults are the paper's best)."""

    shaping: Shaping = field(default="nonlinear", metadata={"help": "advantage rule of the tempsamp method"})
    tau: float = 0.8
    alpha_1: float = 0.01
    alpha_2: float = 1.0
    lambda_off: float = 1.2
    downscale: float = 0.8
    cot_off_policy: Literal["template", "answer_only", "skip"] = "template"
    beta: float = field(default=0.04, metadata={"help": "weight of the KL to the reference; 0 loads no reference"})
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = field(default=None, metadata={"help": "upper bound of the ratio (two-sided clipping)"})
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = "grpo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    off_policy_ratio: Literal["detach", "old"] = "detach"
    off_policy_kl: bool = True
    updates_per_batch: int = field(default=1, metadata={"help": "optimizer updates on every sampled batch"})
    format_weight: float = field(default=1.0, metadata={"help": "weight of the format reward in think mode"})
    require_tags: bool = field(default=True, metadata={"help": "no <answer> tags, no reward"})
    loss_impl: Literal["auto", "triton", "torch"] = "auto"

    def __post_init__(self) -> None:
        require(0 < self.tau <= 1, "tau", self.tau, "in (0, 1]")
        require(self.alpha_1 > 0, "alpha_1", self.alpha_1, "positive")
        require(self.alpha_2 > 0, "alpha_2", self.alpha_2, "positive")
        require(self.beta >= 0, "beta", self.beta, "zero or more")
        require(0 <= self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "in [0, 1)")
        require(self.epsilon_high >= 0, "epsilon_high", self.epsilon_high, "zero or more")
        require(self.delta is None or self.delta > 1 + self.epsilon_high, "delta", self.delta, "over 1 + epsilon_high")
        require(self.updates_per_batch >= 1, "updates_per_batch", self.updates_per_batch, "at least 1")

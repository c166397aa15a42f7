"""Advantages and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tempsamp_fast.config.reward_terms import parse_rewards
from tempsamp_fast.config.setting import require, require_types, setting

Shaping = Literal["grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl"]


@dataclass
class AlgorithmConfig:
    """Advantages and loss (paper section 3; defaults are the paper's best)."""

    shaping: Shaping = setting("nonlinear", "advantage rule of the tempsamp method", source="paper section 3")
    tau: float = setting(0.8, "reward at which the nonlinear shaping turns", source="paper eq. 4")
    alpha_1: float = setting(0.01, "slope of the nonlinear shaping above tau", source="paper eq. 4")
    alpha_2: float = setting(1.0, "steepness of the nonlinear shaping below tau", source="paper eq. 4")
    lambda_off: float = setting(1.2, "anchor's off-policy advantage over the largest sampled one", source="paper eq. 3")
    downscale: float = setting(
        0.8, "downscale's share of the largest task reward that the off-policy answer gets", source="paper section 3"
    )
    scale_rewards: bool = setting(
        True, "grpo, mixed and nonlinear divide by the group's standard deviation (off: Dr. GRPO, arXiv 2503.20783)"
    )
    prune_ratio: float = setting(
        0.0, "share of sampled answers that leave each group before the update, balanced by sign (OraRL: 0.5)"
    )
    cot_off_policy: Literal["template", "answer_only", "skip"] = setting(
        "template",
        "true answer of a think prompt: with a template of a thought, the answer alone, or none",
        source="the paper states none",
    )
    beta: float = setting(
        0.04, "weight of the KL to the reference; 0 loads no reference", unit="per nat", source="paper: 0.04"
    )
    epsilon_low: float = setting(0.2, "lower clip of the ratio: 1 - epsilon_low", source="PPO, arXiv 1707.06347")
    epsilon_high: float = setting(
        0.2, "upper clip of the ratio: 1 + epsilon_high", source="apart from the lower: DAPO, arXiv 2503.14476"
    )
    delta: float | None = setting(
        None, "upper bound of the ratio (two-sided clipping)", source="INTELLECT-2, arXiv 2505.07291"
    )
    dual_clip: float | None = setting(
        None, "bound of the loss of answers with a negative advantage, in multiples of it (arXiv 1912.09729)"
    )
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = setting(
        "grpo",
        "mean over the tokens of each answer (grpo), over max_completion_length (dr_grpo), over all tokens (dapo)",
        source="arXiv 2402.03300, 2503.20783, 2503.14476",
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "ratio of each token, or one of the whole answer (GSPO, arXiv 2507.18071)"
    )
    mask_truncated_completions: bool = setting(
        False,
        "answers cut at max_completion_length leave the loss; their rewards stay in the group's statistics",
        source="DAPO, TRL",
    )
    off_policy_ratio: Literal["detach", "old"] = setting(
        "detach",
        "ratio of the true answer: 1 with a gradient (detach), or to the old policy like the others",
        source="paper section 3: 1",
    )
    off_policy_kl: bool = setting(True, "the true answer pays the KL too")
    updates_per_batch: int = setting(1, "optimizer updates on every sampled batch", unit="updates")
    rewards: str | None = setting(
        None,
        "what answers earn: [file.py:]name[=weight], ...; functions of a file of yours (f(completions, samples) -> "
        "list), tiou, multi_tiou, location, wasserstein, highlight; None: the task's own. A file counts only when "
        "typed; tau is in units of the sum",
    )
    format_weight: float = setting(1.0, "weight of the format reward where it is added", source="paper: 1")
    format_reward: Literal["think", "add", "factor"] = setting(
        "think",
        "added in think mode alone (the paper), in both modes (its release, at format_weight 0.1), or a factor, 0 or "
        "1, of the task's reward (OraRL)",
    )
    soft_overlong: int | None = setting(
        None,
        "tokens before max_completion_length over which answers lose up to 1; None: none",
        unit="tokens",
        source="DAPO",
    )
    require_tags: bool = setting(True, "no <answer> tags, no reward")
    loss_impl: Literal["auto", "triton", "torch"] = setting(
        "auto", "the fused loss in Triton or in torch; auto: Triton on a GPU"
    )

    def __post_init__(self) -> None:
        require_types(self)
        parse_rewards(self.rewards)
        require(0 < self.tau <= 1, "tau", self.tau, "in (0, 1]")
        require(self.alpha_1 > 0, "alpha_1", self.alpha_1, "positive")
        require(self.alpha_2 > 0, "alpha_2", self.alpha_2, "positive")
        require(self.lambda_off > 0, "lambda_off", self.lambda_off, "positive")
        require(0 <= self.downscale <= 1, "downscale", self.downscale, "in [0, 1]")
        require(self.format_weight >= 0, "format_weight", self.format_weight, "zero or more")
        require(self.beta >= 0, "beta", self.beta, "zero or more")
        require(0 <= self.epsilon_low < 1, "epsilon_low", self.epsilon_low, "in [0, 1)")
        require(self.epsilon_high >= 0, "epsilon_high", self.epsilon_high, "zero or more")
        require(self.delta is None or self.delta > 1 + self.epsilon_high, "delta", self.delta, "over 1 + epsilon_high")
        require(self.dual_clip is None or self.dual_clip > 1, "dual_clip", self.dual_clip, "over 1")
        require(0 <= self.prune_ratio < 1, "prune_ratio", self.prune_ratio, "in [0, 1)")
        scaled = self.shaping in ("downscale", "anchor")
        require(self.scale_rewards or not scaled, "scale_rewards", False, f"true with shaping={self.shaping!r}")
        overlong = self.soft_overlong
        require(overlong is None or overlong >= 1, "soft_overlong", overlong, "at least 1")
        require(self.updates_per_batch >= 1, "updates_per_batch", self.updates_per_batch, "at least 1")

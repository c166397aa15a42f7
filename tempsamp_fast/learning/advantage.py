"""Raw rewards of a group to advantages, by any of the six rules, and how skewed each rule would leave them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import get_args

import torch
from tempsamp_kernels import grouped_advantages
from tempsamp_kernels.advantages import shape_rewards
from torch import Tensor

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Method, Shaping
from tempsamp_fast.config.reward_terms import weighted

logger = logging.getLogger(__name__)
UNSCALED = ("grpo", "mixed", "nonlinear")
"""Rules that divide by the standard deviation of the group unless `scale_rewards` is off."""


def assign_advantages(groups: Sequence[RolloutGroup], method: Method, algorithm: AlgorithmConfig) -> None:
    """Fill `advantages` of every group: ones for `sft`, plain normalisation for `grpo`, `algorithm.shaping` else."""
    if method == "sft":
        for group in groups:
            group.advantages = torch.ones(len(group.completions))
        return
    shaping = "grpo" if method == "grpo" else algorithm.shaping
    advantages = _advantages(groups, shaping, algorithm)
    for group, values in zip(groups, advantages.split([len(g.completions) for g in groups]), strict=True):
        group.advantages = values
        if shaping == "anchor" and not values.any() and group.is_off_policy().any():
            _warn_of_silent_anchor()


@cache
def _warn_of_silent_anchor() -> None:
    logger.warning("shaping='anchor': where sampled answers all earn the same, the off-policy answer teaches nothing")


def _advantages(groups: Sequence[RolloutGroup], shaping: str, algorithm: AlgorithmConfig) -> Tensor:
    task_rewards, format_rewards = [], []
    for group in groups:
        for completion in group.completions:
            task, added = task_and_added(completion, algorithm)
            task_rewards.append(task)
            format_rewards.append(added)
    sizes = torch.tensor([len(group.completions) for group in groups])
    rewards, added_rewards = (torch.tensor(each, dtype=torch.float32) for each in (task_rewards, format_rewards))
    if not algorithm.scale_rewards and shaping in UNSCALED:
        if shaping == "nonlinear":
            rewards = shape_rewards(rewards, algorithm.tau, algorithm.alpha_1, algorithm.alpha_2)
        return torch.cat([_centred(values) for values in (rewards + added_rewards).split(sizes.tolist())])
    return grouped_advantages(
        rewards,
        torch.repeat_interleave(torch.arange(len(groups)), sizes),
        torch.cat([group.is_off_policy() for group in groups]),
        shaping=shaping,
        format_rewards=added_rewards,
        tau=algorithm.tau,
        alpha_1=algorithm.alpha_1,
        alpha_2=algorithm.alpha_2,
        lambda_off=algorithm.lambda_off,
        downscale=algorithm.downscale,
    )


def task_and_added(completion: Completion, algorithm: AlgorithmConfig) -> tuple[float, float]:
    """What the task is worth, which rules shape, and what is added after: the weighted format, a penalty for length."""
    rewards = dict(completion.rewards)
    added = rewards.pop("format", 0.0) * algorithm.format_weight + rewards.pop("overlong", 0.0)
    return weighted(rewards, algorithm.rewards), added


def _centred(values: Tensor) -> Tensor:
    """Without their mean; exactly 0 where all are equal."""
    return values - values.mean() if values.max() > values.min() else torch.zeros_like(values)


def advantages_by_rule(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> dict[str, Tensor]:
    """What each rule makes of the rewards of `groups`: [answers] by rule, of `grpo` the sampled answers' alone."""
    on_policy = [
        RolloutGroup(group.prompt, [each for each in group.completions if not each.is_off_policy]) for group in groups
    ]
    return {rule: _advantages(on_policy if rule == "grpo" else groups, rule, algorithm) for rule in get_args(Shaping)}


def advantage_metrics(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> dict[str, float]:
    """Of groups with advantages: `advantage/skew/<rule>`, the skewness of `advantages_by_rule` (paper figure 4), and
    `advantage/flipped`, of the sampled answers with a positive advantage among themselves the share whose advantage
    became negative in the group with the true answer; left out where none is positive. Of the groups that have some,
    `advantage/groups_flipped` is the share in which any did and `advantage/groups_lost` that in which all did.
    """
    by_rule = advantages_by_rule(groups, algorithm)
    metrics = {f"advantage/skew/{rule}": skewness(values) for rule, values in by_rule.items()}
    in_group = torch.cat([group.advantages[~group.is_off_policy()] for group in groups if group.advantages is not None])
    positive = by_rule["grpo"] > 0
    if positive.any():
        metrics["advantage/flipped"] = float((in_group[positive] < 0).float().mean())
        sizes = [int((~group.is_off_policy()).sum()) for group in groups]
        flips = [
            values[was] < 0
            for values, was in zip(in_group.split(sizes), positive.split(sizes), strict=True)
            if was.any()
        ]
        metrics["advantage/groups_flipped"] = fmean(bool(each.any()) for each in flips)
        metrics["advantage/groups_lost"] = fmean(bool(each.all()) for each in flips)
    return metrics


def skewness(values: Tensor | Sequence[float]) -> float:
    """Third standardised moment of [n] values; 0 where all are equal."""
    values = torch.as_tensor(values, dtype=torch.float64)
    centred = values - values.mean()
    variance = centred.square().mean()
    return 0.0 if variance == 0 else float(centred.pow(3).mean() / variance**1.5)

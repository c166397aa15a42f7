"""Fewer answers in the update: the sign-balanced pruning of OraRL (arXiv 2608.20492)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, TrainConfig
from tempsamp_fast.learning.advantage import task_and_added
from tempsamp_fast.model.flops import layout_flops
from tempsamp_fast.model.packing import trees_of

EPS = 1e-6
LEAST_SCALE = 0.25
LEAST_STD = 1e-3
"""Of rewards: below it the advantages that stay are not scaled."""


def prune_groups(groups: Sequence[RolloutGroup], algorithm: AlgorithmConfig) -> list[RolloutGroup]:
    """The groups with the answers that `prune_ratio` leaves of each, their advantages balanced anew.

    Of n sampled answers and the off-policy one stay `int(n * (1 - prune_ratio))` in all, at least two: the off-policy
    one, and of the sampled ones those of the largest advantage on either side (`kept_rows`), in their order. A group
    of so many or fewer stays as it is. Nothing sampled is changed; prompts and answers are shared.
    """
    return [_pruned(group, algorithm) for group in groups]


def _pruned(group: RolloutGroup, algorithm: AlgorithmConfig) -> RolloutGroup:
    assert group.advantages is not None
    is_off_policy = group.is_off_policy()
    kept = kept_rows(group.advantages, is_off_policy, algorithm.prune_ratio)
    if len(kept) == len(group.completions):
        return group
    sampled = [each for each in group.completions if not each.is_off_policy]
    rewards = torch.tensor([sum(task_and_added(each, algorithm)) for each in sampled])
    rest = torch.tensor(kept)
    return replace(
        group,
        completions=[group.completions[row] for row in kept],
        advantages=balanced(
            group.advantages[rest],
            is_off_policy[rest],
            rms=float(group.advantages[~is_off_policy].square().mean().sqrt()),
            std=float(rewards.std()) if len(rewards) > 1 else 0.0,
        ),
    )


def kept_rows(advantages: Tensor, is_off_policy: Tensor, prune_ratio: float) -> list[int]:
    """Which rows of a group stay, in order.

    advantages: [B] float32. is_off_policy: [B] bool. The sampled rows' places are shared out to positive and negative
    advantages, the odd one to the negative side, and go to the largest ones (of equals to the first row). What a side
    cannot fill goes to the largest others, then to rows of advantage 0 in order.
    """
    sampled = [row for row in range(len(advantages)) if not is_off_policy[row]]
    given = [row for row in range(len(advantages)) if is_off_policy[row]]
    places = max(int(len(sampled) * (1 - prune_ratio)), 2) - len(given)
    if places >= len(sampled):
        return list(range(len(advantages)))
    values = advantages.tolist()
    by_size = sorted((row for row in sampled if values[row] != 0), key=lambda row: (-abs(values[row]), row))
    num_positive = places // 2
    chosen = [row for row in by_size if values[row] > 0][:num_positive]
    chosen += [row for row in by_size if values[row] < 0][: places - num_positive]
    others = [row for row in by_size if row not in chosen] + [row for row in sampled if values[row] == 0]
    return sorted([*given, *chosen, *others[: places - len(chosen)]])


def balanced(advantages: Tensor, is_off_policy: Tensor, rms: float, std: float) -> Tensor:
    """[K] advantages of the rows that stay, so that they add up to 0 and are no larger than those of the whole group.

    The mean is taken off. An off-policy row that this turns negative becomes 0, the others bear it in equal shares.
    Where the sampled rewards vary, the result is scaled down, at most to a quarter, to the size of the group before.

    rms: root mean square of the sampled rows' advantages before pruning. std: of their rewards, unbiased.
    """
    centred = advantages - advantages.mean()
    deficit = centred[is_off_policy].clamp(max=0).sum()
    centred = torch.where(is_off_policy, centred.clamp(min=0), centred + deficit / (~is_off_policy).sum())
    size = math.sqrt(float(centred.square().mean()))
    if std < LEAST_STD or size <= EPS:
        return centred
    return centred * min(max(rms / (size + EPS), LEAST_SCALE), 1.0)


def prune_metrics(
    before: Sequence[RolloutGroup],
    after: Sequence[RolloutGroup],
    train: TrainConfig,
    prompts_per_row: int,
    model_config: Any,
) -> dict[str, float]:
    """`prune/kept_share` of the answers, and `prune/flops_saved`, the share of the update's FLOPs that is not spent.

    By `layout_flops` of the trees that the groups are packed as, the vision tower included where it runs.
    """
    counts = [sum(len(group.completions) for group in groups) for groups in (before, after)]
    flops = [
        sum(
            _flops(groups[start : start + prompts_per_row], train, model_config)
            for start in range(0, len(groups), prompts_per_row)
        )
        for groups in (before, after)
    ]
    return {"prune/kept_share": counts[1] / counts[0], "prune/flops_saved": 1 - flops[1] / flops[0]}


def _flops(groups: Sequence[RolloutGroup], train: TrainConfig, model_config: Any) -> float:
    trees = list(trees_of(groups, model_config, train.max_tokens_per_row, train.packing))
    grids = [video.grid_thw for tree in trees for video in tree.videos if video.features is None]
    num_predicted = sum(group.num_answer_tokens for group in groups)
    return layout_flops([tree.layout for tree in trees], num_predicted, grids, model_config)

"""Advantages of grouped completions, some of them off-policy: the six rules of TempSamp-R1 and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.tokens import choose_impl

SHAPINGS = ("grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl")


def shape_rewards(rewards: Tensor, tau: float, alpha_1: float, alpha_2: float) -> Tensor:
    """Flatten rewards above `tau` and stretch those below (arXiv 2509.18056, eq. 4)."""
    above = tau + alpha_1 * torch.log1p((rewards - tau).clamp(min=0))
    scale = torch.expm1(torch.tensor(alpha_2, dtype=rewards.dtype, device=rewards.device))
    below = tau - torch.expm1(alpha_2 * (tau - rewards).clamp(min=0)) / scale
    return torch.where(rewards >= tau, above, below)


def grouped_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    is_off_policy: Tensor,
    *,
    shaping: str = "nonlinear",
    format_rewards: Tensor | None = None,
    tau: float = 0.8,
    alpha_1: float = 0.01,
    alpha_2: float = 1.0,
    lambda_off: float = 1.2,
    downscale: float = 0.8,
    eps: float = 1e-4,
    group_mean: Tensor | None = None,
    group_std: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Advantage of each completion from the raw rewards of its group.

    Args:
        rewards: [B] task rewards.
        group_ids: [B] int64; equal ids make a group, of any size, in any order.
        is_off_policy: [B] bool.
        shaping: "grpo" and "mixed" normalise all rows of a group together; "downscale" first sets off-policy task
            rewards to `downscale` times the group's largest; "nonlinear" first flattens rewards above `tau` and
            stretches those below (`alpha_1`, `alpha_2`); "anchor" normalises on-policy rows among themselves and gives
            off-policy rows `lambda_off` times their largest advantage; "orarl" centres on the on-policy mean.
        format_rewards: [B], added to the shaped or downscaled task rewards.
        group_mean, group_std: [B] statistics of each row's group where groups span processes, replacing those of the
            rows at hand; for the rules that normalise all rows together.

    Returns:
        [B] float32. Rows of a group whose rewards are all equal, or that stands alone, get exactly 0.

    Normalising is `(r - mean) / (unbiased std + eps)`. Raises ValueError for an unknown `shaping`, mismatched shapes
    and statistics that the rule does not take.
    """
    if shaping not in SHAPINGS:
        raise ValueError(f"shaping {shaping!r} is not one of {SHAPINGS}")
    for name, value in (
        ("group_ids", group_ids),
        ("is_off_policy", is_off_policy),
        ("format_rewards", format_rewards),
        ("group_mean", group_mean),
        ("group_std", group_std),
    ):
        if value is not None and value.shape != rewards.shape:
            raise ValueError(f"{name} must be {tuple(rewards.shape)} like rewards; got {tuple(value.shape)}")
    if (group_mean is None) != (group_std is None):
        raise ValueError("group_mean and group_std come together")
    if group_mean is not None and shaping in ("anchor", "orarl"):
        raise ValueError(f"shaping {shaping!r} takes no group_mean and group_std")
    choose_impl(impl, rewards)
    rewards = rewards.detach().float()
    off_policy = is_off_policy.to(rewards.device, torch.bool)
    group_ids = group_ids.to(rewards.device)
    group = group_ids[:, None] == group_ids[None, :]
    if shaping == "nonlinear":
        rewards = shape_rewards(rewards, tau, alpha_1, alpha_2)
    elif shaping == "downscale":
        rewards = torch.where(off_policy, downscale * _extreme(rewards, group, largest=True), rewards)
    if format_rewards is not None:
        rewards = rewards + format_rewards.to(rewards)
    if group_mean is not None and group_std is not None:
        centred = rewards - group_mean.to(rewards)
        return torch.where(group_std.to(rewards) == 0, 0.0, centred / (group_std.to(rewards) + eps))
    if shaping == "anchor":
        peers = group & ~off_policy[None, :]
        on_policy = _normalised(rewards, peers, eps)
        best = _extreme(on_policy, peers, largest=True)
        return torch.where(off_policy, lambda_off * torch.where(peers.any(1), best, 0.0), on_policy)
    if shaping == "orarl":
        return _orarl(rewards, group, off_policy)
    return _normalised(rewards, group, eps)


def _extreme(values: Tensor, members: Tensor, largest: bool) -> Tensor:
    """[B]: over the `members` [B, B] of each row, the largest or smallest of `values` [B]."""
    if not len(values):
        return values
    if largest:
        return torch.where(members, values, -torch.inf).amax(1)
    return torch.where(members, values, torch.inf).amin(1)


def _moments(values: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations over the members of each row, [B] each."""
    count = members.sum(1)
    mean = torch.where(members, values, 0.0).sum(1) / count.clamp(min=1)
    return count, mean, torch.where(members, values - mean[:, None], 0.0).square().sum(1)


def _normalised(values: Tensor, members: Tensor, eps: float) -> Tensor:
    count, mean, squares = _moments(values, members)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    spread = _extreme(values, members, largest=True) > _extreme(values, members, largest=False)
    return torch.where(spread, (values - mean) / (std + eps), 0.0)


def _orarl(values: Tensor, group: Tensor, off_policy: Tensor) -> Tensor:
    """OraRL: on-policy rows around their mean with a gain on the good ones, a bounded bonus for off-policy rows."""
    on_policy = group & ~off_policy[None, :]
    count, mean, squares = _moments(values, on_policy)
    varies = _extreme(values, on_policy, largest=True) > _extreme(values, on_policy, largest=False)
    all_count, _, all_squares = _moments(values, group)
    variance_ratio = (all_squares / all_count.clamp(min=1)) / (squares / count.clamp(min=1)).clamp(min=1e-30)
    gain = torch.where(varies, variance_ratio.pow(0.125).clamp(1, 4), 1.0)
    centred = torch.where(varies, values - mean, 0.0)
    centred = torch.where(centred > 0, centred * gain, centred)
    centred = centred - _moments(centred, on_policy)[1]
    largest = torch.where(count > 0, _extreme(centred, on_policy, largest=True), 0.0)
    surplus = ((values - mean) / values.clamp(min=1e-6)).clamp(0, 1)
    bonus = torch.minimum(2 * surplus.square(), (1.2 * largest).clamp(0.05, 1))
    has_contrast = (count > 0) & (_extreme(values, group, largest=True) > _extreme(values, group, largest=False))
    return torch.where(has_contrast, torch.where(off_policy, bonus, centred), 0.0)

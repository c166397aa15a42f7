"""Advantages of grouped completions, some of them off-policy: the six rules of TempSamp-R1 and its relatives."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.inputs import check_choice
from tempsamp_kernels.launch import choose_impl, launch
from tempsamp_kernels.objectives import least, most
from tempsamp_kernels.optional_triton import tl, triton

NO_SPREAD = 1e-6
"""Equal float32 rewards may have a standard deviation up to this: seven times 0.1 has 8e-9."""
ORARL_EPS = tl.constexpr(1e-6)
"""In the denominators of OraRL (arXiv 2608.20492)."""
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
        group_mean, group_std: [B] mean and unbiased std of each row's whole group where groups span processes, of the
            rewards that the rule normalises (shaped, format rewards added); for "grpo", "mixed" and "nonlinear".

    Returns:
        [B] float32. Rows of a group whose rewards are all equal, or that stands alone, get exactly 0; under a given
        `group_std`, those where it is within rounding of 0 (below 1e-6).

    Normalising is `(r - mean) / (unbiased std + eps)`. Raises ValueError for an unknown `shaping`, mismatched shapes
    and statistics that the rule does not take.
    """
    check_choice("shaping", shaping, SHAPINGS)
    vectors = {"group_ids": group_ids, "is_off_policy": is_off_policy, "format_rewards": format_rewards}
    for name, value in {**vectors, "group_mean": group_mean, "group_std": group_std}.items():
        if value is not None and value.shape != rewards.shape:
            raise ValueError(f"{name} must be {tuple(rewards.shape)} like rewards; got {tuple(value.shape)}")
    if (group_mean is None) != (group_std is None):
        raise ValueError("group_mean and group_std come together")
    if group_mean is not None and shaping in ("downscale", "anchor", "orarl"):
        raise ValueError(f"shaping {shaping!r} needs the rewards of whole groups: it takes no group_mean and group_std")
    impl = choose_impl(impl, rewards)
    rewards = rewards.detach().float()
    fields = (format_rewards, group_mean, group_std)
    form, mean, std = (None if field is None else field.detach().to(rewards) for field in fields)
    off_policy, group_ids = is_off_policy.to(rewards.device, torch.bool), group_ids.to(rewards.device)
    if impl == "torch" or mean is not None:  # nothing is left to sum up
        rewards = shape_rewards(rewards, tau, alpha_1, alpha_2) if shaping == "nonlinear" else rewards
        return _torch(rewards, group_ids, off_policy, shaping, form, lambda_off, downscale, eps, mean, std)
    advantages = torch.empty(rewards.shape, device=rewards.device)
    launch(
        group_advantage_kernel, (len(rewards),), rewards_ptr=rewards, format_ptr=form, group_ids_ptr=group_ids,
        off_policy_ptr=off_policy.view(torch.int8), advantages_ptr=advantages,
        num_rows=len(rewards), tau=float(tau), alpha_1=float(alpha_1), alpha_2=float(alpha_2),
        lambda_off=float(lambda_off), downscale=float(downscale), eps=float(eps), SHAPING=shaping, BLOCK=128,
    )  # fmt: skip
    return advantages


def _torch(
    rewards: Tensor, group_ids: Tensor, off_policy: Tensor, shaping: str, format_rewards: Tensor | None,
    lambda_off: float, downscale: float, eps: float, group_mean: Tensor | None, group_std: Tensor | None,
) -> Tensor:  # fmt: skip
    group = group_ids[:, None] == group_ids[None, :]
    if shaping == "downscale":
        rewards = torch.where(off_policy, downscale * _largest(rewards, group), rewards)
    if format_rewards is not None:
        rewards = rewards + format_rewards
    if group_mean is not None and group_std is not None:
        return torch.where(group_std < NO_SPREAD, 0.0, (rewards - group_mean) / (group_std + eps))
    if shaping == "anchor":
        peers = group & ~off_policy[None, :]
        on_policy = _normalised(rewards, peers, eps)
        best = _largest(on_policy, peers)
        return torch.where(off_policy, lambda_off * torch.where(peers.any(1), best, 0.0), on_policy)
    if shaping == "orarl":
        return _orarl(rewards, group, off_policy)
    return _normalised(rewards, group, eps)


def _largest(values: Tensor, members: Tensor) -> Tensor:
    """[B]: the largest of `values` [B] over the `members` [B, B] of each row."""
    return torch.where(members, values, -torch.inf).amax(1) if len(values) else values


def _moments(values: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations over the members of each row, [B] each."""
    count = members.sum(1)
    mean = torch.where(members, values, 0.0).sum(1) / count.clamp(min=1)
    return count, mean, torch.where(members, values - mean[:, None], 0.0).square().sum(1)


def _unbiased_std(squares: Tensor, count: Tensor) -> Tensor:
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _normalised(values: Tensor, members: Tensor, eps: float) -> Tensor:
    count, mean, squares = _moments(values, members)
    std = _unbiased_std(squares, count)
    return torch.where(_is_flat(values, members), 0.0, (values - mean) / (std + eps))


def _is_flat(values: Tensor, members: Tensor) -> Tensor:
    """[B] bool: all members of the row are equal, or there are none."""
    return _largest(values, members) <= -_largest(-values, members)


def _orarl(values: Tensor, group: Tensor, off_policy: Tensor) -> Tensor:
    """OraRL: on-policy rows around their mean with a gain on the good ones, a bounded bonus for off-policy rows."""
    on_policy = group & ~off_policy[None, :]
    count, mean, squares = _moments(values, on_policy)
    varies = ~_is_flat(values, on_policy)
    all_count, _, all_squares = _moments(values, group)
    std_ratio = _unbiased_std(all_squares, all_count) / (_unbiased_std(squares, count) + ORARL_EPS.value)
    gain = torch.where(varies, std_ratio.pow(0.25).clamp(1, 4), 1.0)
    centred = torch.where(varies, values - mean, 0.0)
    centred = torch.where(centred > 0, centred * gain, centred)
    centred = centred - _moments(centred, on_policy)[1]
    largest = torch.where(count > 0, _largest(centred, on_policy), 0.0)
    surplus = ((values - mean) / (values + ORARL_EPS.value)).clamp(0, 1)
    bonus = torch.minimum(2 * surplus.square(), (1.2 * largest).clamp(0.05, 1))
    has_contrast = (count > 0) & ~_is_flat(values, group)
    return torch.where(has_contrast, torch.where(off_policy, bonus, centred), 0.0)


@triton.jit
def _members(
    rewards_ptr, format_ptr, group_ids_ptr, off_policy_ptr, group_id, top, rows, num_rows, tau, alpha_1, alpha_2,
    downscale, SHAPING: tl.constexpr,
):  # fmt: skip
    """Shaped rewards of a block of rows, which of them are in the group, and which of those are on-policy."""
    inside = rows < num_rows
    value = tl.load(rewards_ptr + rows, mask=inside, other=0.0)
    member = inside & (tl.load(group_ids_ptr + rows, mask=inside, other=0) == group_id)
    off_policy = tl.load(off_policy_ptr + rows, mask=inside, other=0) != 0
    if SHAPING == "nonlinear":
        above = tau + alpha_1 * tl.log(1 + most(value - tau, 0.0))
        below = tau - (tl.exp(alpha_2 * most(tau - value, 0.0)) - 1) / (tl.exp(alpha_2) - 1)
        value = tl.where(value >= tau, above, below)
    if SHAPING == "downscale":
        value = tl.where(off_policy, downscale * top, value)
    if format_ptr is not None:
        value += tl.load(format_ptr + rows, mask=inside, other=0.0)
    return value, member, member & (off_policy == 0)


@triton.jit(do_not_specialize=["num_rows"])
def group_advantage_kernel(
    rewards_ptr, format_ptr, group_ids_ptr, off_policy_ptr, advantages_ptr, num_rows, tau, alpha_1, alpha_2,
    lambda_off, downscale, eps, SHAPING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, which reads its whole group: a few rows, and no order of them is assumed.

    A group with a reward that is no number has no other advantages: its sum says so where a GPU's maximum does not.
    """
    row = tl.program_id(0)
    tau, alpha_1, alpha_2 = tl.cast(tau, tl.float32), tl.cast(alpha_1, tl.float32), tl.cast(alpha_2, tl.float32)
    lambda_off, downscale = tl.cast(lambda_off, tl.float32), tl.cast(downscale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    group_id = tl.load(group_ids_ptr + row)
    top = -float("inf")
    if SHAPING == "downscale":
        for start in range(0, num_rows, BLOCK):
            rows = start + tl.arange(0, BLOCK)
            inside = rows < num_rows
            member = inside & (tl.load(group_ids_ptr + rows, mask=inside, other=0) == group_id)
            value = tl.load(rewards_ptr + rows, mask=inside, other=0.0)
            top = tl.maximum(top, tl.max(tl.where(member, value, float("-inf")), axis=0))

    own, count, total, high, low = 0.0, 0.0, 0.0, -float("inf"), float("inf")
    on_count, on_total, on_high, on_low = 0.0, 0.0, -float("inf"), float("inf")
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        value, member, on_policy = _members(
            rewards_ptr, format_ptr, group_ids_ptr, off_policy_ptr, group_id, top,
            rows, num_rows, tau, alpha_1, alpha_2, downscale, SHAPING,
        )  # fmt: skip
        own += tl.sum(tl.where(rows == row, value, 0.0), axis=0)
        count += tl.sum(member.to(tl.float32), axis=0)
        total += tl.sum(tl.where(member, value, 0.0), axis=0)
        high = tl.maximum(high, tl.max(tl.where(member, value, float("-inf")), axis=0))
        low = tl.minimum(low, tl.min(tl.where(member, value, float("inf")), axis=0))
        on_count += tl.sum(on_policy.to(tl.float32), axis=0)
        on_total += tl.sum(tl.where(on_policy, value, 0.0), axis=0)
        on_high = tl.maximum(on_high, tl.max(tl.where(on_policy, value, float("-inf")), axis=0))
        on_low = tl.minimum(on_low, tl.min(tl.where(on_policy, value, float("inf")), axis=0))
    mean, on_mean = total / count, on_total / most(on_count, 1.0)
    is_flat, on_is_flat = (high <= low) & (total == total), (on_high <= on_low) & (on_total == on_total)

    squares, on_squares, on_above = 0.0, 0.0, 0.0
    for start in range(0, num_rows, BLOCK):
        value, member, on_policy = _members(
            rewards_ptr, format_ptr, group_ids_ptr, off_policy_ptr, group_id, top,
            start + tl.arange(0, BLOCK), num_rows, tau, alpha_1, alpha_2, downscale, SHAPING,
        )  # fmt: skip
        squares += tl.sum(tl.where(member, (value - mean) * (value - mean), 0.0), axis=0)
        on_squares += tl.sum(tl.where(on_policy, (value - on_mean) * (value - on_mean), 0.0), axis=0)
        on_above += tl.sum(tl.where(on_policy, most(value - on_mean, 0.0), 0.0), axis=0)

    is_off_policy = tl.load(off_policy_ptr + row) != 0
    if SHAPING == "anchor":
        scale = tl.where(on_is_flat, 0.0, 1 / (tl.sqrt(on_squares / most(on_count - 1, 1.0)) + eps))
        best = tl.where(on_is_flat, 0.0, on_high - on_mean)
        advantage = tl.where(is_off_policy, lambda_off * best, own - on_mean) * scale
    elif SHAPING == "orarl":
        all_std = tl.sqrt(squares / most(count - 1, 1.0))
        std_ratio = all_std / (tl.sqrt(on_squares / most(on_count - 1, 1.0)) + ORARL_EPS)
        gain = tl.where(on_is_flat, 1.0, least(tl.exp(0.25 * tl.log(most(std_ratio, 1.0))), 4.0))
        offset = (gain - 1) * on_above / most(on_count, 1.0)  # of rewards around their mean, as much is above as below
        centred = own - on_mean
        centred = tl.where(on_is_flat, 0.0, tl.where(centred > 0, centred * gain, centred) - offset)
        largest = tl.where(on_is_flat, 0.0, (on_high - on_mean) * gain - offset)
        surplus = least(most((own - on_mean) / (own + ORARL_EPS), 0.0), 1.0)
        bonus = least(2 * surplus * surplus, least(most(1.2 * largest, 0.05), 1.0))
        advantage = tl.where(is_off_policy, bonus, centred)
        advantage = tl.where(is_flat | (on_count == 0), 0.0, advantage)
    else:
        std = tl.sqrt(squares / most(count - 1, 1.0))
        advantage = tl.where(is_flat, 0.0, (own - mean) / (std + eps))
    tl.store(advantages_ptr + row, advantage)

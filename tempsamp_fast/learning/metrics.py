"""What a step logs of its update: metrics of rows and of ranks made one, and how well the device was used."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import TrainConfig
from tempsamp_fast.model.flops import device_peak_flops, forward_flops
from tempsamp_fast.model.packing import PackedRow
from tempsamp_fast.system.ranks import num_ranks, of_all_ranks
from tempsamp_fast.system.stopwatch import Stopwatch

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "loss": sum,
    "num_tokens": sum,
    "ratio_min": min,
    "ratio_max": max,
}
"""How the figures of rows that are no means become one."""
OF_GROUPS = ("reward/", "completion/", "advantage/", "batch/skipped_share")
"""What names of means over a rank's groups begin with; ranks may have other numbers of groups."""


def combine(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The metrics of a step from `LossMetrics.as_dict` of all of its rows, as `loss` and `policy/<name>`.

    Losses add up (each is already divided by the step's counts) and so do token counts; extremes stay extremes, and
    all others are means over tokens. A row may lack the names of a side (on or off policy) that it has no answer of.
    """
    combined = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        side, _, figure = name.rpartition("/")
        values = [part[name] for part in having]
        if figure in REDUCTIONS:
            value = REDUCTIONS[figure](values)
        else:
            counts = [part[f"{side}/num_tokens" if side else "num_tokens"] for part in having]
            value = sum(map(operator.mul, values, counts)) / max(sum(counts), 1)
        combined[name if name == "loss" else f"policy/{name}"] = value
    return combined


def mean_over_ranks(metrics: dict[str, float], num_groups: int) -> dict[str, float]:
    """Every metric averaged over the ranks that have it; of lengths the extremes stay extremes.

    num_groups: of this rank, by which means over groups are weighted.
    """
    parts = of_all_ranks((num_groups, metrics))
    found = {}
    for name in dict.fromkeys(name for _, part in parts for name in part):
        values = [part[name] for _, part in parts if name in part]
        weights = [number for number, part in parts if name in part] if name.startswith(OF_GROUPS) else None
        extreme = {"completion/min_length": min, "completion/max_length": max}.get(name)
        found[name] = extreme(values) if extreme else fmean(values, weights)
    return found


def logp_gap(
    logps: Sequence[Tensor], answers: Sequence[Completion], limit: float, compared: Sequence[bool] | None = None
) -> dict[str, float]:
    """Mean absolute difference between the sampler's log-probs and the policy's, over the sampled tokens of the update.

    Nothing where there are none. Called by every rank, and raises ValueError on every rank where it is above the limit
    on one.

    logps: [M] of each row, before the first update. compared: of each answer, whether the loss has it; None: all.
    """
    by_answer = torch.cat(list(logps)).cpu().split([len(answer.ids) for answer in answers]) if answers else []
    gaps = [
        (own - answer.sampled_logps).abs()
        for own, answer, is_compared in zip(by_answer, answers, compared or [True] * len(answers), strict=True)
        if is_compared and answer.sampled_logps is not None
    ]
    gap = float(torch.cat(gaps).mean()) if gaps else 0.0
    largest = max(of_all_ranks(gap))
    if limit and largest > limit:
        raise ValueError(
            f"rollout/logp_gap={largest:.3g} is above max_logp_gap={limit}: the log-probs that answers were sampled by "
            "are not the policy's, as when its weights do not reach the sampler; choose rollout_backend='policy', or a "
            "higher limit where dtypes or dropout explain it"
        )
    return {"rollout/logp_gap": gap} if gaps else {}


def tree_saving(rows: Sequence[PackedRow], groups: Sequence[RolloutGroup], train: TrainConfig) -> dict[str, float]:
    """`batch/tree_saving`: how many times fewer tokens the rows have than with the video again for every question."""
    if train.queries_per_video == 1 or train.packing != "shared_prefix" or not rows:
        return {}
    return {"batch/tree_saving": sum(group.num_tokens for group in groups) / sum(row.num_tokens for row in rows)}


def utilisation(rows: Sequence[PackedRow], num_updates: int, engine: Any, watch: Stopwatch) -> dict[str, float]:
    """Tokens of all ranks' packed rows per second of the step; model FLOPs utilisation (MFU) of this device.

    MFU: three times the forward FLOPs of the rows over the time of forward and backward passes and the device's dense
    bf16 peak; nothing where the peak is not known.
    """
    num_tokens = number_per_rank(sum(row.num_tokens for row in rows), engine.device) * num_ranks()
    found = {"perf/tokens_per_s": num_tokens / watch.total()["time/step_s"]}
    peak = device_peak_flops(engine.device)
    if peak is not None:
        ranks_of = [row.shares.num_ranks if row.shares else 1 for row in rows]
        by_row = [forward_flops(row, engine.module.config) / ranks for row, ranks in zip(rows, ranks_of, strict=True)]
        flops = 3 * num_updates * sum(by_row)
        found["perf/mfu"] = flops / watch.seconds["time/forward_backward_s"] / peak
    return found


def number_per_rank(number: float, device: torch.device) -> float:
    """The mean of a count over all ranks, by a reduction on the device."""
    if num_ranks() == 1:
        return float(number)
    total = torch.tensor(float(number), device=device)
    dist.all_reduce(total)
    return float(total) / num_ranks()

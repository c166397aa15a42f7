"""One optimizer step from scored groups: pack, compare with old and reference log-probs, accumulate, update."""

from __future__ import annotations

import dataclasses
import logging
import math
import operator
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Config, Method, TrainConfig
from tempsamp_fast.learning.balance import balance
from tempsamp_fast.learning.engine import Forward, RowsTooLargeError, check_fitted, forward_of, in_step, optimizer_step
from tempsamp_fast.learning.loss import RowTargets, idle_loss, log_probs, policy_loss
from tempsamp_fast.learning.pruning import prune_groups, prune_metrics
from tempsamp_fast.model.flops import device_peak_flops, forward_flops
from tempsamp_fast.model.packing import PackedRow, pack
from tempsamp_fast.model.policy import Head
from tempsamp_fast.system.ranks import max_over_ranks, num_ranks, of_all_ranks
from tempsamp_fast.system.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "loss": sum,
    "num_tokens": sum,
    "ratio_min": min,
    "ratio_max": max,
}
"""How the figures of rows that are no means become one."""


def update(
    engine: Any,
    reference: Forward | None,
    groups: Sequence[RolloutGroup],
    method: Method,
    config: Config,
    prompts_per_row: int,
    learning_rate: float,
    watch: Stopwatch,
) -> dict[str, float]:
    """Update the policy on all ranks' groups, `updates_per_batch` times; returns the metrics of the last update.

    `optim/grad_norm` is the largest of all updates', not finite when that of any is not.

    Where a row does not fit the memory, this batch is packed again with half the budget, on every rank, as often as
    needed, down to the longest prompt or answer: longer groups run in stages. `batch/max_tokens_per_row` then tells it.
    Raises ValueError when that does not fit either.

    Groups whose advantages are all zero are left out where they have no gradient: they count in the loss's normalisers,
    but `policy/*` describes the answers of the others. With `prune_ratio` all of this is of the answers that stay.
    """
    shorter: dict[str, float] = {}
    train = config.train
    if method != "sft" and config.algorithm.prune_ratio:
        sampled, groups = groups, prune_groups(groups, config.algorithm)
        shorter = prune_metrics(sampled, groups, train, prompts_per_row, engine.module.config)
    while True:
        try:
            found = _update(engine, reference, groups, method, config, prompts_per_row, learning_rate, watch)
            return found | shorter
        except RowsTooLargeError as error:
            too_much = min(error.num_tokens, config.train.max_tokens_per_row)
        torch.cuda.empty_cache()
        learning = [group for group in groups if _has_gradient(group, method == "sft", config.algorithm)]
        longest = max_over_ranks(max(map(_longest_part, learning), default=0), engine.device)
        budget = max(too_much // 2, longest)
        if budget >= too_much:
            raise ValueError(
                f"out of memory in the update at max_tokens_per_row={too_much}, and this batch has a prompt or answer "
                f"of {longest} tokens: try gradient_checkpointing, a higher zero_stage, or lower max_pixels and fps"
            )
        logger.warning("max_tokens_per_row=%d does not fit the memory: this batch again with %d", too_much, budget)
        config = dataclasses.replace(config, train=dataclasses.replace(train, max_tokens_per_row=budget))
        shorter |= {"batch/max_tokens_per_row": float(budget)}


def _longest_part(group: RolloutGroup) -> int:
    """The least budget that a group can be packed with."""
    return max(len(group.prompt.input_ids), *(len(completion.ids) for completion in group.completions))


def _update(
    engine: Any,
    reference: Forward | None,
    groups: Sequence[RolloutGroup],
    method: Method,
    config: Config,
    prompts_per_row: int,
    learning_rate: float,
    watch: Stopwatch,
) -> dict[str, float]:
    algorithm, temperature = config.algorithm, config.rollout.temperature
    is_sft = method == "sft"
    num_answers = _mean_over_ranks(sum(len(group.completions) for group in groups), engine.device)
    num_tokens = _mean_over_ranks(sum(group.num_answer_tokens for group in groups), engine.device)
    having_gradient = [group for group in groups if _has_gradient(group, is_sft, algorithm)]
    learning = balance(having_gradient, engine.module.config)
    own_rows = [
        row
        for start in range(0, len(learning), prompts_per_row)
        for row in pack(
            learning[start : start + prompts_per_row],
            config=engine.module.config,
            max_tokens_per_row=config.train.max_tokens_per_row,
            mode=config.train.packing,
        )
    ]
    rows = [row.to(engine.device) for row in in_step(engine, own_rows)]
    watch.lap("pack")
    old = ref = None
    if algorithm.updates_per_batch > 1 and not is_sft:
        old = _log_probs(engine, forward_of(engine), rows, algorithm, temperature)
        watch.lap("old_log_probs")
    if reference is not None and algorithm.beta > 0 and not is_sft:
        ref = _log_probs(engine, reference, rows, algorithm, temperature)
        watch.lap("reference")
    targets = _targets(own_rows, learning, old, ref)
    heads = [
        policy_loss(
            row, target, method, algorithm, temperature, num_answers, num_tokens, config.rollout.max_completion_length
        )
        for row, target in zip(own_rows, targets, strict=True)
    ]
    # vLLM tells log-probs at temperature 1, whatever it samples at.
    as_sampled: list[Tensor] = []
    if config.rollout.rollout_backend == "vllm" and temperature != 1 and not is_sft:
        heads = [
            _noting(as_sampled, log_probs(row, algorithm, 1.0), head) for row, head in zip(own_rows, heads, strict=True)
        ]
    heads += [idle_loss] * (len(rows) - len(own_rows))
    num_updates = 1 if is_sft else algorithm.updates_per_batch
    grad_norms = []
    for index in range(num_updates):
        try:
            row_metrics, grad_norm = optimizer_step(engine, rows, heads, learning_rate, watch)
            grad_norms.append(grad_norm)
            if index == 0:
                logps = as_sampled or [metrics.token_logps for metrics in row_metrics]
                gap = _logp_gap(logps[: len(own_rows)], learning, config.rollout.max_logp_gap)
        except RowsTooLargeError as error:
            if index == 0:
                raise
            raise ValueError(f"out of memory in update {index + 1} of a batch; lower max_tokens_per_row") from error
    own_metrics = [
        {name: value for name, value in metrics.as_dict().items() if ref is not None or name.rpartition("/")[2] != "kl"}
        for metrics in row_metrics[: len(own_rows)]
    ]
    all_metrics = [metrics for of_rank in of_all_ranks(own_metrics) for metrics in of_rank]
    combined = {"loss": 0.0} | combine(all_metrics)
    combined["loss"] /= num_ranks()  # each rank divides by its share of the step's answers
    return (
        combined
        | {
            "optim/learning_rate": learning_rate,
            "optim/grad_norm": max(grad_norms, key=lambda norm: norm if math.isfinite(norm) else math.inf),
            "batch/num_tokens": float(sum(row.num_tokens for row in own_rows)),
            "batch/skipped_share": 1 - len(having_gradient) / len(groups),
        }
        | _tree_saving(own_rows, learning, config.train)
        | gap
        | _utilisation(own_rows, num_updates, engine, watch)
    )


def _has_gradient(group: RolloutGroup, is_sft: bool, algorithm: AlgorithmConfig) -> bool:
    """False only where leaving the group out changes nothing."""
    assert group.advantages is not None
    return is_sft or algorithm.beta > 0 or bool(group.advantages.any())


def _noting(found: list[Tensor], logps: Callable[[Tensor, Tensor], Tensor], head: Head) -> Head:
    """A head that also adds what `logps` gives to `found`."""

    def both(hidden: Tensor, weight: Tensor) -> Any:
        found.append(logps(hidden, weight))
        return head(hidden, weight)

    return both


def _logp_gap(logps: Sequence[Tensor], groups: Sequence[RolloutGroup], limit: float) -> dict[str, float]:
    """Mean absolute difference between the sampler's log-probs and the policy's, over the sampled tokens of the update.

    Nothing where there are none. Called by every rank, and raises ValueError on every rank where it is above the limit
    on one.

    logps: [M] of each row, before the first update.
    """
    answers = [completion for group in groups for completion in group.completions]
    by_answer = torch.cat(list(logps)).cpu().split([len(answer.ids) for answer in answers]) if answers else []
    gaps = [
        (own - answer.sampled_logps).abs()
        for own, answer in zip(by_answer, answers, strict=True)
        if answer.sampled_logps is not None
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


def _tree_saving(rows: Sequence[PackedRow], groups: Sequence[RolloutGroup], train: TrainConfig) -> dict[str, float]:
    """`batch/tree_saving`: how many times fewer tokens the rows have than with the video again for every question."""
    if train.queries_per_video == 1 or train.packing != "shared_prefix" or not rows:
        return {}
    return {"batch/tree_saving": sum(group.num_tokens for group in groups) / sum(row.num_tokens for row in rows)}


def _utilisation(rows: Sequence[PackedRow], num_updates: int, engine: Any, watch: Stopwatch) -> dict[str, float]:
    """Tokens of all ranks' packed rows per second of the step; model FLOPs utilisation (MFU) of this device.

    MFU: three times the forward FLOPs of the rows over the time of forward and backward passes and the device's dense
    bf16 peak; nothing where the peak is not known.
    """
    num_tokens = _mean_over_ranks(sum(row.num_tokens for row in rows), engine.device) * num_ranks()
    found = {"perf/tokens_per_s": num_tokens / watch.total()["time/step_s"]}
    peak = device_peak_flops(engine.device)
    if peak is not None:
        flops = 3 * num_updates * sum(forward_flops(row, engine.module.config) for row in rows)
        found["perf/mfu"] = flops / watch.seconds["time/forward_backward_s"] / peak
    return found


def _targets(
    rows: Sequence[PackedRow],
    groups: Sequence[RolloutGroup],
    old: Sequence[Tensor] | None,
    ref: Sequence[Tensor] | None,
) -> list[RowTargets]:
    """Rows hold the answers of group after group, in order; without rows there are none."""
    if not rows:
        return []
    assert all(group.advantages is not None for group in groups)
    sizes = [row.num_completions for row in rows]
    advantages = torch.cat([group.advantages for group in groups if group.advantages is not None]).split(sizes)
    is_off_policy = torch.cat([group.is_off_policy() for group in groups]).split(sizes)
    return [
        RowTargets(advantages[i], is_off_policy[i], old[i] if old else None, ref[i] if ref else None)
        for i in range(len(rows))
    ]


@torch.no_grad()
def _log_probs(
    engine: Any, forward: Forward, rows: Sequence[PackedRow], algorithm: AlgorithmConfig, temperature: float
) -> list[Tensor]:
    """Raises RowsTooLargeError on every rank, as `optimizer_step` does; ZeRO-3 raises what the failing rank met."""
    found: list[Tensor] = []
    try:
        for row in rows:
            head = log_probs(row, algorithm, temperature)
            found.append(forward(row, head))
    except torch.OutOfMemoryError:
        if engine.zero_optimization_stage() == 3:
            raise
    check_fitted(rows, len(found) == len(rows), engine.device)
    return found


def _mean_over_ranks(number: float, device: torch.device) -> float:
    if num_ranks() == 1:
        return float(number)
    total = torch.tensor(float(number), device=device)
    dist.all_reduce(total)
    return float(total) / num_ranks()


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
            value = sum(map(operator.mul, values, counts)) / sum(counts)
        combined[name if name == "loss" else f"policy/{name}"] = value
    return combined


def mean_over_ranks(metrics: dict[str, float]) -> dict[str, float]:
    """Every metric averaged over the ranks that have it; of lengths the extremes stay extremes."""
    parts = of_all_ranks(metrics)
    names = dict.fromkeys(name for part in parts for name in part)
    having = {name: [part[name] for part in parts if name in part] for name in names}
    extremes = {"completion/min_length": min, "completion/max_length": max}
    return {name: extremes.get(name, fmean)(values) for name, values in having.items()}

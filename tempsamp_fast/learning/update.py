"""One optimizer step from scored groups: pack, compare with old and reference log-probs, accumulate, update."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Config, Method
from tempsamp_fast.learning.balance import balance
from tempsamp_fast.learning.engine import RowsTooLargeError, check_fitted, in_step, optimizer_step
from tempsamp_fast.learning.loss import (
    idle_loss,
    is_counted,
    log_probs,
    own_answers,
    own_targets,
    policy_loss,
    row_targets,
)
from tempsamp_fast.learning.metrics import combine, logp_gap, number_per_rank, tree_saving, utilisation
from tempsamp_fast.learning.partitioned import Forward, forward_of
from tempsamp_fast.learning.pruning import prune_groups, prune_metrics
from tempsamp_fast.model.packing import PackedRow, pack
from tempsamp_fast.model.policy import Head
from tempsamp_fast.model.sequence_parallel import share_out
from tempsamp_fast.system.ranks import max_over_ranks, num_ranks, of_all_ranks
from tempsamp_fast.system.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


def update(
    engine: Any,
    reference: Forward | None,
    groups: Sequence[RolloutGroup],
    method: Method,
    config: Config,
    prompts_per_row: int,
    learning_rate: float,
    watch: Stopwatch,
    sequence_group: Any = None,
) -> dict[str, float]:
    """Update the policy on all ranks' groups, `updates_per_batch` times; returns the metrics of the last update.

    `optim/grad_norm` is the largest of all updates', not finite when that of any is not.

    Where a row does not fit the memory, this batch is packed again with half the budget, on every rank, as often as
    needed, down to the longest prompt or answer: longer groups run in stages. `batch/max_tokens_per_row` then tells it.
    Raises ValueError when that does not fit either.

    Groups whose advantages are all zero are left out where they have no gradient: they count in the loss's normalisers,
    but `policy/*` describes the answers of the others. With `prune_ratio` all of this is of the answers that stay.

    sequence_group: neighbouring ranks that run each row together; the token budget of a row is that of each of them.
    """
    shorter: dict[str, float] = {}
    train = config.train
    if method != "sft" and config.algorithm.prune_ratio:
        sampled, groups = groups, prune_groups(groups, config.algorithm)
        shorter = prune_metrics(sampled, groups, train, prompts_per_row, engine.module.config)
    while True:
        try:
            given = config, prompts_per_row, learning_rate, watch, sequence_group
            return _update(engine, reference, groups, method, *given) | shorter
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
    sequence_group: Any,
) -> dict[str, float]:
    algorithm, temperature = config.algorithm, config.rollout.temperature
    is_sft = method == "sft"
    num_answers = number_per_rank(sum(len(group.completions) for group in groups), engine.device)
    counted = [each for group in groups for each in group.completions if is_counted(each, algorithm)]
    num_tokens = number_per_rank(sum(len(each.ids) for each in counted), engine.device)
    having_gradient = [group for group in groups if _has_gradient(group, is_sft, algorithm)]
    ranks_together = dist.get_world_size(sequence_group) if sequence_group else 1
    learning = balance(having_gradient, engine.module.config, engine.device, ranks_together)
    whole_rows = [
        row
        for start in range(0, len(learning), prompts_per_row)
        for row in pack(
            learning[start : start + prompts_per_row],
            config=engine.module.config,
            max_tokens_per_row=config.train.max_tokens_per_row * ranks_together,
            mode=config.train.packing,
        )
    ]
    own_rows = whole_rows
    if sequence_group:
        own_rows = [share_out(row, sequence_group, engine.module.config) for row in whole_rows]
    rows = [row.to(engine.device) for row in in_step(engine, own_rows, sequence_group)]
    watch.lap("pack")
    old = ref = None
    if algorithm.updates_per_batch > 1 and not is_sft:
        old = _log_probs(engine, forward_of(engine), rows, algorithm, temperature)
        watch.lap("old_log_probs")
    if reference is not None and algorithm.beta > 0 and not is_sft:
        ref = _log_probs(engine, reference, rows, algorithm, temperature)
        watch.lap("reference")
    targets = row_targets(whole_rows, learning, old, ref, algorithm)
    counts = num_answers, num_tokens, config.rollout.max_completion_length
    heads: list[Head] = [
        policy_loss(row, own_targets(target, row), method, algorithm, temperature, *counts)
        if len(row.token_ids)
        else idle_loss  # of this row other ranks have the answers
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
            reduces_once = config.train.reduce_gradients != "row"
            row_metrics, grad_norm = optimizer_step(engine, rows, heads, learning_rate, watch, reduces_once)
            grad_norms.append(grad_norm)
            if index == 0:
                own_metrics = [metrics for metrics in row_metrics[: len(own_rows)] if metrics is not None]
                logps = as_sampled or [metrics.token_logps for metrics in own_metrics]
                answers = _own_answers(learning, own_rows)
                compared = [is_counted(each, algorithm) for each in answers]
                gap = logp_gap(logps, answers, config.rollout.max_logp_gap, compared)
        except RowsTooLargeError as error:
            if index == 0:
                raise
            raise ValueError(f"out of memory in update {index + 1} of a batch; lower max_tokens_per_row") from error
    figures = [
        {name: value for name, value in metrics.as_dict().items() if ref is not None or name.rpartition("/")[2] != "kl"}
        for metrics in row_metrics[: len(own_rows)]
        if metrics is not None
    ]
    num_tokens_run = sum(row.num_tokens for row in own_rows)
    by_rank = of_all_ranks((num_tokens_run, figures))
    all_metrics = [metrics for _, of_rank in by_rank for metrics in of_rank]
    loads = [each for each, _ in by_rank]
    combined = {"loss": 0.0} | combine(all_metrics)
    combined["loss"] /= num_ranks()  # each rank divides by its share of the step's answers
    return (
        combined
        | {
            "optim/learning_rate": learning_rate,
            "optim/grad_norm": max(grad_norms, key=lambda norm: norm if math.isfinite(norm) else math.inf),
            "batch/num_tokens": float(num_tokens_run),
            "batch/idle_share": 1 - sum(loads) / max(1, len(loads) * max(loads)),
            "batch/skipped_share": 1 - len(having_gradient) / len(groups),
        }
        | tree_saving(whole_rows, learning, config.train)
        | gap
        | utilisation(own_rows, num_updates, engine, watch)
    )


def _own_answers(groups: Sequence[RolloutGroup], rows: Sequence[PackedRow]) -> list[Completion]:
    """The answers of rows that hold those of group after group; of shared rows those that are this rank's."""
    answers = iter([each for group in groups for each in group.completions])
    by_row = [list(islice(answers, row.num_completions)) for row in rows]
    return [each for row, found in zip(rows, by_row, strict=True) for each in found[own_answers(row)]]


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


@torch.no_grad()
def _log_probs(
    engine: Any, forward: Forward, rows: Sequence[PackedRow], algorithm: AlgorithmConfig, temperature: float
) -> list[Tensor]:
    """Raises RowsTooLargeError on every rank, as `optimizer_step` does.

    Under ZeRO-3 and in rows that ranks share it raises what the failing rank met.
    """
    found: list[Tensor] = []
    try:
        for row in rows:
            head = log_probs(row, algorithm, temperature)
            found.append(forward(row, head))
    except torch.OutOfMemoryError:
        if engine.zero_optimization_stage() == 3 or any(row.shares for row in rows):
            raise
    check_fitted(rows, len(found) == len(rows), engine.device)
    return found

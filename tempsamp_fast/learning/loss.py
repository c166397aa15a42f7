"""What is computed on the hidden states of a packed row: the policy loss, or the log-probs it compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob
from tempsamp_kernels.head import chunk_rows
from torch import Tensor

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Method
from tempsamp_fast.model.packing import PackedRow


@dataclass(frozen=True)
class RowTargets:
    """What the loss needs of one packed row besides its tokens; B answers, M predicted tokens."""

    advantages: Tensor
    """[B] float32."""
    is_off_policy: Tensor
    """[B] bool."""
    old_logps: Tensor | None = None
    """[M] float32, log-probs before the first update on this batch; None: those of this very forward pass."""
    ref_logps: Tensor | None = None
    """[M] float32 of the frozen reference; None without KL."""
    row_mask: Tensor | None = None
    """[B] bool, answers that count; None: all."""


def is_counted(answer: Completion, algorithm: AlgorithmConfig) -> bool:
    """Whether an answer is in the loss."""
    return not (answer.is_cut and algorithm.mask_truncated_completions)


def row_targets(
    rows: Sequence[PackedRow],
    groups: Sequence[RolloutGroup],
    old: Sequence[Tensor] | None,
    ref: Sequence[Tensor] | None,
    algorithm: AlgorithmConfig,
) -> list[RowTargets]:
    """Rows hold the answers of group after group, in order; without rows there are none."""
    if not rows:
        return []
    assert all(group.advantages is not None for group in groups)
    sizes = [row.num_completions for row in rows]
    advantages = torch.cat([group.advantages for group in groups if group.advantages is not None]).split(sizes)
    is_off_policy = torch.cat([group.is_off_policy() for group in groups]).split(sizes)
    counts = torch.tensor([is_counted(each, algorithm) for group in groups for each in group.completions])
    masks = counts.split(sizes) if algorithm.mask_truncated_completions else None
    return [
        RowTargets(
            advantages[i],
            is_off_policy[i],
            old_logps=old[i] if old else None,
            ref_logps=ref[i] if ref else None,
            row_mask=masks[i] if masks else None,
        )
        for i in range(len(rows))
    ]


def own_answers(row: PackedRow) -> slice:
    """Of the row's answers those whose loss this rank computes: all but in a row that ranks share."""
    return row.shares.answers if row.shares else slice(None)


def own_targets(targets: RowTargets, row: PackedRow) -> RowTargets:
    """Of a whole row's targets those of this rank's answers, to which log-probs are confined already."""
    mine = own_answers(row)
    mask = None if targets.row_mask is None else targets.row_mask[mine]
    by_answer = targets.advantages[mine], targets.is_off_policy[mine]
    return RowTargets(*by_answer, targets.old_logps, targets.ref_logps, mask)


def policy_loss(
    row: PackedRow,
    targets: RowTargets,
    method: Method,
    algorithm: AlgorithmConfig,
    temperature: float,
    num_answers: float,
    num_tokens: float,
    max_completion_length: int,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Any]]:
    """A head that gives (loss, metrics) of a row, by the fused loss; `sft` is the mean negative log-likelihood.

    `row` and `targets` stay on the CPU, so that answers without a gradient are known there and leave the backward.
    `num_answers` and `num_tokens` count the whole optimizer step, per rank on average, so that gradients do not depend
    on how answers are spread over rows, micro-steps and ranks.
    """
    options: dict[str, Any] = {"loss_type": "sft"}
    if method != "sft":
        options = {
            "loss_type": algorithm.loss_type,
            "advantages": targets.advantages,
            "old_logps": targets.old_logps,
            "ref_logps": targets.ref_logps,
            "importance_sampling_level": algorithm.importance_sampling_level,
            "temperature": temperature,
            "beta": algorithm.beta,
            "epsilon_low": algorithm.epsilon_low,
            "epsilon_high": algorithm.epsilon_high,
            "delta": algorithm.delta,
            "dual_clip": algorithm.dual_clip,
            "off_policy_ratio": algorithm.off_policy_ratio,
            "off_policy_kl": algorithm.off_policy_kl,
            "max_completion_length": max_completion_length,
        }

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        return fused_linear_grpo_loss(
            hidden,
            weight,
            row.token_ids.to(hidden.device, non_blocking=True),
            row.row_ids,
            is_off_policy=targets.is_off_policy,
            row_mask=targets.row_mask,
            num_rows=num_answers,
            num_items_in_batch=num_tokens,
            chunk_size=None if targets.old_logps is None else _chunk_size(row, weight),
            impl=None if algorithm.loss_impl == "auto" else algorithm.loss_impl,
            **options,
        )

    return head


def idle_loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
    """The head of an idle row: zero, with a gradient of zero for every parameter."""
    return ((0.0 * hidden) @ weight.T).sum(), None


def log_probs(row: PackedRow, algorithm: AlgorithmConfig, temperature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A head that gives the [M] float32 log-probs of a row's answer tokens, without gradient.

    They are computed as the loss computes its own, so that those of one policy are the same to the bit: a ratio of 1, a
    KL of 0.
    """

    @torch.no_grad()
    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        if not len(row.token_ids):
            return hidden.new_empty(0, dtype=torch.float32)
        impl = None if algorithm.loss_impl == "auto" else algorithm.loss_impl
        token_ids, chunk_size = row.token_ids.to(hidden.device, non_blocking=True), _chunk_size(row, weight)
        logps, _ = linear_logprob(hidden, weight, token_ids, temperature=temperature, chunk_size=chunk_size, impl=impl)
        return logps

    return head


def _chunk_size(row: PackedRow, weight: Tensor) -> int:
    """That of a loss over all of the row's answers, also where some of them leave its backward."""
    return chunk_rows(len(row.token_ids), len(weight), weight.device.type)

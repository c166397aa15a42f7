"""From hidden states and rewards to the policy loss, its gradients made in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels.advantages import grouped_advantages
from tempsamp_kernels.head import ChunkedHead, HeadGradients, finish, gradient_scale
from tempsamp_kernels.inputs import (
    check_choice,
    check_head,
    check_positive,
    check_token_ids,
    check_vector,
    count_rows,
    known_logps,
    on_host,
    spread,
)
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.logprob import KERNELS, forward_sweep, gradient_sweep
from tempsamp_kernels.metrics import LossMetrics, summarise
from tempsamp_kernels.objectives import TokenLoss, Vespo, bounded_log, token_loss
from tempsamp_kernels.reference import evaluate, token_log_ratio
from tempsamp_kernels.sequences import Sequences
from tempsamp_kernels.tokens import NUM_TERMS, SKIP, TERMS, HeadOptions, Tokens
from tempsamp_kernels.weights import live_tokens, row_lengths, slopes, token_mask, token_weights


def fused_linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    row_ids: Tensor,
    *,
    advantages: Tensor | None = None,
    rewards: Tensor | None = None,
    group_ids: Tensor | None = None,
    is_off_policy: Tensor | None = None,
    format_rewards: Tensor | None = None,
    shaping: str = "nonlinear",
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    dual_clip: float | None = None,
    kl_type: str = "k3",
    off_policy_ratio: str = "detach",
    off_policy_kl: bool = True,
    num_rows: float | Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    max_completion_length: int | None = None,
    live_rows: Tensor | None = None,
    chunk_size: int | None = None,
    impl: str | None = None,
    advantages_level: str | None = None,
    row_mask: Tensor | None = None,
    importance_weights: Tensor | None = None,
    importance_cap: float | None = None,
    importance_mode: str = "truncate",
    entropy_coef: float = 0.0,
    entropy_threshold: float | Tensor | None = None,
    cispo_low: float | None = None,
    log_ratio_clamp: float | None = None,
    kl_clamp: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    **shaping_options: Any,
) -> tuple[Tensor, LossMetrics]:
    """Policy loss of packed tokens, from hidden states to a scalar with gradients for head and hidden states.

    Args:
        hidden: [N, H] packed hidden states, float32, bfloat16 or float16, each predicting its token of `token_ids`.
        weight: [V, H] head.
        token_ids: [N] int64; an unmasked one outside the vocabulary raises on a CPU and gives NaN on a GPU.
        row_ids: [N] int64: the completion each token belongs to, numbered from 0.
        advantages: [B], one per completion, or [N], one per token; not for "sft". With as many completions as tokens
            `advantages_level` "row" or "token" says which; without it, here and in `temperature` and
            `importance_weights`, "row" where `is_off_policy`, `rewards` or `row_mask` say that there are N
            completions, else "token".
        rewards, group_ids, is_off_policy, format_rewards, shaping, shaping_options: in place of `advantages`, the
            arguments of `grouped_advantages` ([B] each); `shaping_options` are its remaining keywords (`tau`, ...).
        is_off_policy: [B] bool, also without `rewards`: completions that the policy did not sample.
        old_logps: [N]; without them the ratio is exp(logp - logp.detach()).
        ref_logps: [N]; without them there is no KL term.
        mask: [N] bool, tokens that count; the others may hold anything, NaN included.
        row_mask: [B] bool, completions that count; tokens of the others are masked, their place in `num_rows` stays.
        bias: [V].
        temperature: a positive number, [B] or [N].
        softcap, logit_scale: as in `linear_logprob`.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo" (clipped ratio), "cispo", "sapo", "vespo" as in TRL and
            Liger 0.8.5, or "sft": negative log-likelihood, mean over rows of the mean over tokens.
        importance_sampling_level: "token"; "sequence", the geometric mean over the row (GSPO); or "sequence_token",
            that mean with the gradient of each token's own log-prob (GSPO-token). The latter two cost 8NHV FLOPs.
        importance_weights: [B] or [N] positive factors of the policy term, as `exp(old_logps - rollout_logps)` of
            rollouts sampled by another engine; for "vespo" a factor of the row's ratio. `importance_cap` bounds them:
            "truncate" (TIS) takes the cap for a larger one, "mask" (MIS) 0.
        beta: weight of the KL term; kl_type: "k1", "k2", "k3" (default) or "k3_corrected" (times the ratio).
        entropy_coef: weight of an entropy bonus, normalised as the loss type normalises its policy term.
        entropy_threshold: number, scalar tensor, [B] or [N]: tokens of less entropy have neither policy term nor bonus
            (arXiv 2506.01939), as `torch.quantile(entropy[mask], 0.8)` of a log-prob pass.
        epsilon_low, epsilon_high, delta, dual_clip: bounds of the ratio; for "cispo" `epsilon_high` is the upper bound
            itself, `cispo_low` the lower one if there is to be one.
        log_ratio_clamp, kl_clamp: bounds of the log-probs' differences (20 in verl) and of the KL (10), with no
            gradient beyond; none by default.
        sapo_temperature_pos, ..., vespo_lambda_neg: parameters of "sapo" and "vespo".
        off_policy_ratio: "detach" gives off-policy completions ratio exp(logp - logp.detach()) whatever `old_logps`
            say; "old" treats them like the others. off_policy_kl: whether they pay the KL term.
        num_rows: normaliser of "grpo", "dr_grpo", "sapo", "luspo" and "sft"; by default the completions present in
            `row_ids`. Pass the global count for exact gradient accumulation.
        num_items_in_batch: normaliser of "dapo", "cispo" and "vespo"; by default the unmasked tokens.
        max_completion_length: required by "dr_grpo".
        live_rows: [N] bool on the CPU, False for tokens known to have no gradient: they leave the backward GEMMs. Found
            out here where `row_ids`, `mask` and `advantages` or `rewards` are CPU tensors.
        chunk_size: tokens per chunk of logits; by default equal chunks within a memory budget. A fixed size makes
            log-probs comparable to the bit between calls with different numbers of tokens.
        impl: "triton", "torch", or None for the one that suits the device.

    Returns:
        `(loss, metrics)`: float32 scalar, and `LossMetrics` on the device.

    Gradients are made in the forward pass at 6NHV FLOPs (4NHV with a frozen head), one chunk of logits in memory.
    Raises ValueError for shapes, dtypes, names and combinations that do not fit.
    """
    check_head(hidden, weight, token_ids, bias, chunk_size)
    is_by_token = isinstance(temperature, Tensor) and temperature.shape == (len(hidden),)
    may_be_masked = is_by_token and not (mask is None and row_mask is None)
    check_positive(temperature=None if may_be_masked else temperature, softcap=softcap, num_rows=num_rows)
    check_positive(max_completion_length=max_completion_length)
    check_choice("off_policy_ratio", off_policy_ratio, ("detach", "old"))
    check_choice("importance_mode", importance_mode, ("truncate", "mask"))
    if advantages_level is not None:
        check_choice("advantages_level", advantages_level, ("row", "token"))
    objective = token_loss(
        loss_type, kl_type, epsilon_low, epsilon_high, delta, dual_clip, sapo_temperature_pos, sapo_temperature_neg,
        cispo_low, log_ratio_clamp, kl_clamp, importance_sampling_level,
    )  # fmt: skip
    impl = choose_impl(impl, hidden)
    num_tokens, device = len(hidden), hidden.device

    # An advantage for every token, where it was given.
    check_vector("row_ids", row_ids, num_tokens, torch.int64)
    given = {"group_ids": group_ids, "format_rewards": format_rewards, **shaping_options}
    if rewards is not None:
        if advantages is not None or advantages_level == "token" or group_ids is None or is_off_policy is None:
            raise ValueError("rewards need group_ids and is_off_policy, and take the place of advantages, one per row")
        impl_of_rewards = impl if rewards.is_cuda else None
        advantages = grouped_advantages(
            rewards, is_off_policy=is_off_policy, shaping=shaping, impl=impl_of_rewards, **given
        )
        advantages_level = "row"
    elif unused := ", ".join(sorted(name for name, value in given.items() if value is not None)):
        raise ValueError(f"without rewards there is no use for {unused}")
    by_row: dict[str, Any] = {"is_off_policy": is_off_policy, "row_mask": row_mask}
    by_row_or_token: dict[str, Any] = {"temperature": temperature, "importance_weights": importance_weights}
    (by_row if advantages_level == "row" else by_row_or_token)["advantages"] = advantages
    num_completions = count_rows(by_row, by_row_or_token, num_tokens)
    num_row_ids = max(1, num_tokens if num_completions is None else num_completions)
    if on_host(row_ids) and num_tokens and not 0 <= int(row_ids.min()) <= int(row_ids.max()) < num_row_ids:
        found = f"{int(row_ids.min())} to {int(row_ids.max())}"
        raise ValueError(f"row_ids must be below {num_row_ids}, numbered from 0; got {found}")
    if loss_type == "sft":
        if advantages is not None:
            raise ValueError("loss_type 'sft' takes neither advantages nor rewards")
        advantages = torch.ones(num_tokens, device=row_ids.device)
        advantages_level = "token"
    elif advantages is None:
        raise ValueError("advantages or rewards are missing")
    home = advantages.device if on_host(row_ids) else row_ids.device
    advantage = spread("advantages", advantages, row_ids.to(home), num_completions, advantages_level)

    # Which tokens count, and which of them can have a gradient: known without waiting where all of it is on the host.
    mask = token_mask(mask, row_mask, row_ids, device)
    has_kl, shares_ratio = beta != 0 and ref_logps is not None, importance_sampling_level != "token"
    if live_rows is None or torch.compiler.is_compiling():
        always = has_kl or entropy_coef != 0 or loss_type == "sft"
        live_rows = live_tokens(mask, advantage, always, shared_by=row_ids if shares_ratio else None)
    elif not on_host(live_rows) or live_rows.shape != (num_tokens,):
        raise ValueError(f"live_rows must be ({num_tokens},) bool on the CPU; got {tuple(live_rows.shape)}")

    # What each token's terms count for.
    check_token_ids(token_ids, mask, len(weight))
    row_ids, mask = row_ids.to(device, non_blocking=True), mask.to(device, non_blocking=True)
    by_token = lambda name, value: spread(name, value, row_ids, num_completions)
    off_policy = torch.zeros_like(mask)
    if is_off_policy is not None:
        off_policy = is_off_policy.to(device, torch.bool, non_blocking=True)[row_ids]
    lengths = row_lengths(mask, row_ids, num_row_ids)
    if num_rows is None:
        num_rows = torch.zeros(num_row_ids, device=device).index_fill_(0, row_ids, 1.0).sum().clamp(min=1)
    counts_for = token_weights(loss_type, mask, lengths, num_rows, num_items_in_batch, max_completion_length)
    policy_weight, importance = counts_for, None
    if importance_weights is not None:
        importance = by_token("importance_weights", importance_weights)
        if importance_cap is not None:
            replaced_by = importance_cap if importance_mode == "truncate" else 0
            importance = importance.masked_fill(importance > importance_cap, replaced_by)
        importance = importance.masked_fill(~mask, 1)
        policy_weight = counts_for if loss_type == "vespo" else counts_for * importance
    of_tokens = by_token("temperature", temperature).masked_fill(~mask, 1)
    check_positive(temperature=of_tokens)
    tokens = Tokens(
        token_ids=token_ids.masked_fill(~mask, SKIP),
        temperature=of_tokens,
        advantage=advantage.to(device, non_blocking=True).masked_fill(~mask, 0),
        policy_weight=policy_weight,
        kl_weight=has_kl * beta * (counts_for if off_policy_kl else counts_for * ~off_policy),
        old_logps=known_logps(old_logps, mask & ~off_policy if off_policy_ratio == "detach" else mask, "old_logps"),
        ref_logps=known_logps(ref_logps if has_kl else None, mask, "ref_logps"),
        entropy_weight=entropy_coef * counts_for if entropy_coef else None,
        entropy_threshold=None if entropy_threshold is None else by_token("entropy_threshold", entropy_threshold),
    )

    sequences = Sequences(row_ids, num_row_ids, mask, lengths, None, importance_sampling_level == "sequence")
    if loss_type == "vespo":
        vespo = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        if importance is not None and importance_weights is not None:  # a row's own weight counts once
            is_vector = isinstance(importance_weights, Tensor) and importance_weights.ndim == 1
            parts = 1 if is_vector and len(importance_weights) != num_completions else lengths
            vespo = replace(vespo, log_weight=sequences.row_sum(bounded_log(importance) / parts))
        sequences = replace(sequences, vespo=vespo)
    is_needed = shares_ratio or (loss_type == "vespo" and (old_logps is not None or importance is not None))
    options = HeadOptions(bias, softcap, logit_scale, impl)
    plan = LossPlan(tokens, mask, options, objective, chunk_size, num_tokens, sequences if is_needed else None)
    loss, terms = run(plan, hidden, weight, bias, live_rows)
    return loss, summarise(terms, mask, off_policy)


@dataclass(frozen=True)
class LossPlan:
    """Everything about a loss that is not differentiable."""

    tokens: Tokens
    mask: Tensor
    """[N] bool: where False, the hidden state is taken as zero, whatever it holds."""
    options: HeadOptions
    loss: TokenLoss
    chunk_size: int | None
    num_live: int
    """Tokens from here on have no gradient and leave the backward GEMMs."""
    sequences: Sequences | None = None
    """Set where the tokens of a row depend on each other: all log-probs come first then."""


def run(
    plan: LossPlan, hidden: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and terms [NUM_TERMS, N] of a plan; tokens not `live` ([N] bool on the CPU) are moved behind the others."""
    wants_grad = torch.is_grad_enabled()
    if live is None or bool(live.all()):
        return FusedLinearLoss.apply(hidden, weight, bias, plan, wants_grad)
    order = torch.argsort(~live, stable=True).to(hidden.device, non_blocking=True)
    place = torch.argsort(order)
    moved = replace(
        plan, tokens=plan.tokens[order], mask=plan.mask[order], num_live=int(live.sum()),
        sequences=plan.sequences and plan.sequences.reordered(order),
    )  # fmt: skip
    loss, terms = FusedLinearLoss.apply(hidden.index_select(0, order), weight, bias, moved, wants_grad)
    return loss, terms[:, place]


class FusedLinearLoss(torch.autograd.Function):
    """`(hidden, weight, bias, plan, wants_grad) -> (loss, terms [NUM_TERMS, N])`; the loss is the sum of its terms."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: LossPlan, wants_grad: bool
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(hidden, weight, plan.mask, plan.chunk_size)
        gradients = HeadGradients(head, *(wants_grad and needed for needed in ctx.needs_input_grad[:3]))
        num_live = plan.num_live if gradients.any() else 0
        live, dead = slice(0, num_live), slice(num_live, None)
        if plan.sequences is None:
            scale = gradient_scale(slopes(plan.tokens), head.gemm_dtype)
            learned = _learn(head.part(live), plan, gradients, scale)
            terms = torch.cat([learned, _watch(head.part(dead), plan, plan.tokens[dead])], dim=1)
        else:
            terms, scale = _learn_together(head, plan, live, gradients)
        ctx.save_for_backward(*gradients.state(head), scale)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(terms)
        return terms[TERMS.index("loss")].sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *state, scale = ctx.saved_tensors
        return (*finish(state, ctx.dtypes, d_loss if scale is None else d_loss / scale[0]), None, None)


def _learn(head: ChunkedHead, plan: LossPlan, gradients: HeadGradients, gradient_scale: Tensor | None) -> Tensor:
    """Terms by one pass, 6NHV FLOPs: logits, loss and its gradient while they are at hand, dX and dW."""
    kernels = KERNELS[plan.options.impl]
    tokens = plan.tokens[: head.num_tokens].padded(head.num_padded)
    terms = torch.empty(NUM_TERMS, head.num_padded, device=head.weight.device)

    def consume(logits: Tensor, chunk: slice, out: Tensor) -> None:
        terms[:, chunk] = kernels.row_loss(logits, tokens[chunk], plan.options, plan.loss, out, gradient_scale)

    head.sweep(consume, gradients)
    return terms[:, : head.num_tokens]


def _watch(head: ChunkedHead, plan: LossPlan, tokens: Tokens) -> Tensor:
    """Terms of tokens without a gradient: 2NHV FLOPs."""
    rows, _ = forward_sweep(head, tokens, plan.options)
    return evaluate(rows, token_log_ratio(rows.logp, tokens), tokens, plan.loss)[0]


def _learn_together(
    head: ChunkedHead, plan: LossPlan, live: slice, gradients: HeadGradients
) -> tuple[Tensor, Tensor | None]:
    """All log-probs before the first gradient: 8NHV FLOPs, or 6NHV where one chunk holds the logits of all tokens."""
    assert plan.sequences is not None
    rows, kept = forward_sweep(head, plan.tokens, plan.options)
    terms, d_logp, d_entropy = plan.sequences.terms(rows, plan.tokens, plan.loss)
    part = head.part(live)
    kept = kept if part.num_tokens == head.num_tokens else None
    d_entropy = None if d_entropy is None else d_entropy[live]
    of_part = plan.tokens[live], plan.options, rows[live], d_logp[live], d_entropy
    return terms, gradient_sweep(part, *of_part, gradients, kept)

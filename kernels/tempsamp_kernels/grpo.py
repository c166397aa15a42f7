"""From hidden states and rewards to the policy loss, its gradients made in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels.advantages import grouped_advantages
from tempsamp_kernels.head import ChunkedHead, HeadGradients, check_head, check_token_ids
from tempsamp_kernels.logprob import KERNELS, forward_sweep, gradient_sweep
from tempsamp_kernels.metrics import LossMetrics, summarise
from tempsamp_kernels.objectives import OBJECTIVE_OF_LOSS_TYPE, SELF, TokenLoss, token_loss
from tempsamp_kernels.reference import token_log_ratio, token_terms
from tempsamp_kernels.sequences import Sequences, Vespo
from tempsamp_kernels.tokens import NUM_TERMS, TERMS, HeadOptions, Tokens, check_temperature, choose_impl, per_token


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
    """Set where the tokens of a row depend on each other: all log-probs come first then, at 8NHV instead of 6NHV."""


class FusedLinearLoss(torch.autograd.Function):
    """`(hidden, weight, bias, plan, wants_grad) -> (loss, terms [NUM_TERMS, N])`; the loss is the sum of its terms."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: LossPlan, wants_grad: bool
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(hidden, weight, plan.mask, plan.chunk_size)
        gradients = head.gradients(*(wants_grad and needed for needed in ctx.needs_input_grad[:3]))
        num_live = plan.num_live if gradients.any() else 0
        terms = torch.empty(NUM_TERMS, len(hidden), device=hidden.device)
        live, dead = slice(0, num_live), slice(num_live, None)
        if plan.sequences is None:
            _learn(head.part(live), plan, terms[:, live], gradients)
            _watch(head.part(dead), plan, terms[:, dead], plan.tokens.map(lambda field: field[dead]))
        else:
            rows = forward_sweep(head, plan.tokens, plan.options)
            terms, d_logp = plan.sequences.terms(rows, plan.tokens, plan.loss)
            cut = lambda values: values[live]
            gradient_sweep(
                head.part(live), plan.tokens.map(cut), plan.options, rows.map(cut), d_logp[live], None, gradients
            )
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(terms)
        return terms[TERMS.index("loss")].sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if gradient is None else torch.mul(gradient, d_loss, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None)


def _learn(head: ChunkedHead, plan: LossPlan, terms: Tensor, gradients: HeadGradients) -> None:
    """One pass, 6NHV FLOPs: logits, loss and its gradient while they are at hand, dX and dW."""
    kernels = KERNELS[plan.options.impl]
    tokens = plan.tokens.map(lambda field: field[: head.num_tokens]).padded(head.num_padded)

    def consume(logits: Tensor, chunk: slice) -> Tensor:
        inputs = tokens.map(lambda field: field[chunk])
        found, d_logits = kernels.row_loss(logits, inputs, plan.options, plan.loss, head.gemm_dtype)
        target = terms[:, chunk]
        target.copy_(found[:, : target.shape[1]])
        return d_logits

    head.sweep(consume, gradients)


def _watch(head: ChunkedHead, plan: LossPlan, terms: Tensor, tokens: Tokens) -> None:
    """Terms of tokens without a gradient: 2NHV FLOPs."""
    rows = forward_sweep(head, tokens, plan.options)
    terms.copy_(token_terms(rows.logp, rows.entropy, token_log_ratio(rows.logp, tokens), tokens, plan.loss)[0])


def row_lengths(mask: Tensor, row_ids: Tensor, num_row_ids: int) -> Tensor:
    """[N] fp32: unmasked tokens in the row of each token, at least 1."""
    counts = torch.zeros(num_row_ids, device=mask.device).index_add_(0, row_ids, mask.float())
    return counts.clamp(min=1)[row_ids]


def token_weights(
    loss_type: str,
    mask: Tensor,
    lengths: Tensor,
    num_rows: float | Tensor,
    num_items_in_batch: float | Tensor | None,
    max_completion_length: int | None,
) -> Tensor:
    """[N] fp32: what each token's loss counts for; the normalisers of Liger and TRL, 0 where masked."""
    weight = mask.float()
    if loss_type in ("grpo", "sapo", "sft"):
        return weight / lengths / num_rows
    if loss_type == "luspo":
        return weight / num_rows
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        return weight / (num_rows * max_completion_length)
    num_items = weight.sum() if loss_type == "bnpo" or num_items_in_batch is None else num_items_in_batch
    if isinstance(num_items, Tensor):
        return weight / num_items.to(mask.device, non_blocking=True).clamp(min=1)
    return weight / max(num_items, 1)


def on_host(*tensors: Tensor | None) -> bool:
    """Whether all values can be looked at without waiting for a device."""
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)


def live_tokens(mask: Tensor | None, advantage: Tensor, always: bool, shared_by: Tensor | None = None) -> Tensor | None:
    """[N] bool on the CPU: tokens that may have a gradient, or None where only the device could tell.

    Without a KL term (`always` False) that takes a nonzero advantage: the token's own, or that of any token in its row
    where `shared_by` [N] says which tokens share a ratio.
    """
    if not on_host(advantage, mask, shared_by):
        return None
    counts = torch.ones(len(advantage), dtype=torch.bool) if mask is None else mask.bool()
    live = counts if always else counts & (advantage != 0)
    if shared_by is None or not len(live):
        return live
    learns = torch.zeros(int(shared_by.max()) + 1, dtype=torch.bool)
    learns[shared_by[live]] = True
    return counts & learns[shared_by]


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
    **shaping_options: Any,
) -> tuple[Tensor, LossMetrics]:
    """Policy loss of packed tokens, from hidden states to a scalar with gradients for head and hidden states.

    Args:
        hidden: [N, H] packed hidden states, float32, bfloat16 or float16, each predicting its token of `token_ids`.
        weight: [V, H] head.
        token_ids: [N] int64; an unmasked one outside the vocabulary raises on a CPU and gives NaN on a GPU.
        row_ids: [N] int64: the completion each token belongs to, numbered from 0.
        advantages: [B], one per completion, or [N]; a length of N means one per token, here and in `temperature`. Not
            for "sft".
        rewards, group_ids, is_off_policy, format_rewards, shaping, shaping_options: in place of `advantages`, the
            arguments of `grouped_advantages` ([B] each); `shaping_options` are its remaining keywords (`tau`, ...).
        is_off_policy: [B] bool, also without `rewards`: completions that the policy did not sample.
        old_logps: [N]; without them the ratio is exp(logp - logp.detach()).
        ref_logps: [N]; without them there is no KL term.
        mask: [N] bool, tokens that count; the others may hold anything, NaN included.
        bias: [V].
        temperature: a positive number, [B] or [N].
        softcap, logit_scale: as in `linear_logprob`.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "luspo" (clipped ratio), "cispo", "sapo", "vespo" as in TRL and
            Liger 0.8.5, or "sft": negative log-likelihood, mean over rows of the mean over tokens.
        importance_sampling_level: "token", or "sequence" for the geometric mean over the row (GSPO), at 8NHV FLOPs.
        beta: weight of the KL term; kl_type: "k1", "k2", "k3" (default) or "k3_corrected" (times the ratio).
        epsilon_low, epsilon_high, delta, dual_clip: bounds of the ratio; for "cispo" `epsilon_high` is the bound.
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

    Gradients are made in the forward pass at 6NHV FLOPs (4NHV with a frozen head) without keeping the logits.
    Raises ValueError for shapes, dtypes, names and combinations that do not fit.
    """
    check_head(hidden, weight, token_ids, bias)
    check_temperature(temperature)
    objective = token_loss(loss_type, kl_type, epsilon_low, epsilon_high, delta, dual_clip)
    for name, value, choices in (
        ("importance_sampling_level", importance_sampling_level, ("token", "sequence")),
        ("off_policy_ratio", off_policy_ratio, ("detach", "old")),
    ):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is not one of {choices}")
    clips = OBJECTIVE_OF_LOSS_TYPE[loss_type] == "clipped"
    for name, bound in (("delta", delta), ("dual_clip", dual_clip)):
        if bound is not None and not clips:
            raise ValueError(f"loss_type {loss_type!r} takes no {name}; got {bound}")
    if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo", "sft"):
        raise ValueError(f"loss_type {loss_type!r} has no importance_sampling_level 'sequence'")
    impl = choose_impl(impl, hidden)
    if rewards is not None:
        if advantages is not None or group_ids is None or is_off_policy is None:
            raise ValueError("rewards need group_ids and is_off_policy, and take the place of advantages")
        advantages = grouped_advantages(
            rewards,
            group_ids,
            is_off_policy,
            shaping=shaping,
            format_rewards=format_rewards,
            impl=impl if rewards.is_cuda else None,
            **shaping_options,
        )
    else:
        given = {"group_ids": group_ids, "format_rewards": format_rewards}
        unused = sorted([*(name for name, value in given.items() if value is not None), *shaping_options])
        if unused:
            raise ValueError(f"without rewards there is no use for {', '.join(unused)}")
    if loss_type == "sft":
        if advantages is not None:
            raise ValueError("loss_type 'sft' takes neither advantages nor rewards")
        advantages = torch.ones(len(row_ids), device=row_ids.device)
    elif advantages is None:
        raise ValueError("advantages or rewards are missing")

    num_tokens, device = len(hidden), hidden.device
    for name, field in (("row_ids", row_ids), ("mask", mask)):
        if field is not None and field.shape != (num_tokens,):
            raise ValueError(f"{name} must be ({num_tokens},) like token_ids; got {tuple(field.shape)}")
    by_row = {} if is_off_policy is None else {"is_off_policy": len(is_off_policy)}
    if rewards is not None or (loss_type != "sft" and len(advantages) != num_tokens):
        by_row["advantages"] = len(advantages)
    if len(set(by_row.values())) > 1:
        raise ValueError(f"these must hold one value per completion, as many as each other: {by_row}")
    num_row_ids = max(1, *(by_row.values() or [num_tokens]))
    if on_host(row_ids) and num_tokens and int(row_ids.max()) >= num_row_ids:
        raise ValueError(f"row_ids must be below {num_row_ids}; got {int(row_ids.max())}")
    has_kl = beta != 0 and ref_logps is not None
    shares_ratio = importance_sampling_level == "sequence"
    if "advantages" in by_row:
        advantages = advantages.to(device if not on_host(row_ids) else advantages.device, non_blocking=True)
        advantages = advantages[row_ids.to(advantages.device, non_blocking=True)]
    if live_rows is None and on_host(row_ids):
        always = has_kl or loss_type == "sft"
        live_rows = live_tokens(mask, advantages, always, shared_by=row_ids if shares_ratio else None)
    elif live_rows is not None and (not on_host(live_rows) or live_rows.shape != (num_tokens,)):
        raise ValueError(f"live_rows must be ({num_tokens},) bool on the CPU; got {tuple(live_rows.shape)}")

    row_ids = row_ids.to(device, non_blocking=True)
    mask = torch.ones(num_tokens, device=device) if mask is None else mask
    mask = mask.to(device, torch.bool, non_blocking=True)
    off_policy = torch.zeros_like(mask)
    if is_off_policy is not None:
        off_policy = is_off_policy.to(device, torch.bool, non_blocking=True)[row_ids]
    lengths = row_lengths(mask, row_ids, num_row_ids)
    if num_rows is None:
        num_rows = torch.zeros(num_row_ids, device=device).index_fill_(0, row_ids, 1.0).sum().clamp(min=1)
    counts_for = token_weights(loss_type, mask, lengths, num_rows, num_items_in_batch, max_completion_length)
    pays_kl = counts_for if off_policy_kl else counts_for * ~off_policy
    token_ids = token_ids.masked_fill(~mask, 0)
    check_token_ids(token_ids, len(weight))
    tokens = Tokens(
        token_ids=token_ids,
        temperature=per_token(temperature, row_ids, num_tokens, "temperature", device),
        advantage=per_token(advantages, None, num_tokens, "advantages", device).masked_fill(~mask, 0),
        policy_weight=counts_for,
        kl_weight=beta * pays_kl if has_kl else torch.zeros_like(counts_for),
        old_logps=known_logps(old_logps, mask & ~off_policy if off_policy_ratio == "detach" else mask, "old_logps"),
        ref_logps=known_logps(ref_logps if has_kl else None, mask, "ref_logps"),
    )
    sequences = None
    if shares_ratio:
        sequences = Sequences(row_ids, num_row_ids, mask, lengths, impl)
    elif loss_type == "vespo" and old_logps is not None:
        sequences = Sequences(row_ids, num_row_ids, mask, lengths, impl, Vespo())
    options = HeadOptions(bias, softcap, logit_scale, impl)
    plan = LossPlan(tokens, mask, options, objective, chunk_size, num_tokens, sequences)
    loss, terms = run(plan, hidden, weight, bias, live_rows)
    return loss, summarise(terms, mask, off_policy)


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
        plan,
        tokens=plan.tokens.map(lambda field: field[order]),
        mask=plan.mask[order],
        num_live=int(live.sum()),
        sequences=plan.sequences and plan.sequences.reordered(order),
    )
    loss, terms = FusedLinearLoss.apply(hidden.index_select(0, order), weight, bias, moved, wants_grad)
    return loss, terms[:, place]


def known_logps(logps: Tensor | None, known: Tensor, name: str) -> Tensor:
    """[N] fp32 log-probs, `SELF` where there are none or `known` [N] bool is False."""
    if logps is None:
        return torch.full(known.shape, SELF, device=known.device)
    if logps.shape != known.shape:
        raise ValueError(f"{name} must be {tuple(known.shape)}; got {tuple(logps.shape)}")
    return logps.detach().to(known.device, torch.float32, non_blocking=True).masked_fill(~known, SELF)

"""The GRPO loss of logits that a trainer holds already, under the name and arguments of Liger-Kernel's function."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels.inputs import check_choice
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.logits import completion_logps
from tempsamp_kernels.objectives import SELF, TokenLoss, token_loss
from tempsamp_kernels.reference import evaluate
from tempsamp_kernels.sequences import LEVELS, Vespo
from tempsamp_kernels.tokens import TERMS, RowStatistics, Tokens
from tempsamp_kernels.weights import bounded_log, token_weights


class _TokenLoss(torch.autograd.Function):
    """Terms [NUM_TERMS, B, L] of every token; the loss among them is differentiable in logp and in log_ratio."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, log_ratio: Tensor, tokens: Tokens, loss: TokenLoss) -> tuple[Tensor, Tensor]:
        unread = torch.zeros_like(logp)
        terms, d_logp, d_log_ratio, _ = evaluate(RowStatistics(logp, unread, unread), log_ratio, tokens, loss)
        ctx.save_for_backward(d_logp, d_log_ratio)
        ctx.mark_non_differentiable(terms)
        return terms[TERMS.index("loss")].clone(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_logp, d_log_ratio = ctx.saved_tensors
        return d_loss * d_logp, d_loss * d_log_ratio, None, None


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """GRPO loss of logits [B, L + 1, V], in place of `liger_kernel.transformers.grpo_loss.triton_grpo_loss`.

    Args:
        logits: as from `model(..., logits_to_keep=L + 1)`, any float dtype and strides; position t predicts
            completion_ids[:, t], the last one nothing.
        old_logp, ref_logp: [B, L]; without old_logp the ratio is 1 with the gradient of log p. ref_logp goes with
            beta != 0.
        completion_ids: [B, L] int64; completion_mask: [B, L], tokens that count. The others may hold anything.
        advantages: [B], or [B, L].
        inplace: let the backward overwrite the logits with their gradient (then it can run only once).
        vllm_is_ratio: [B], [B, 1] or [B, L], factor of the policy loss but not of the KL term.
        delta: upper bound of the unclipped ratio. use_bias_correction_kl: KL times the ratio.
        num_items_in_batch: tokens of the whole batch over all processes, normaliser of "dapo", "cispo" and "vespo".
        impl: "triton", "torch", or None for the one that suits the device.

    Returns:
        `(per_token_loss, per_token_kl or None, is_clipped)`, float32 [B, L] and 0 where masked, or with `reduce`
        `(loss, [kl if beta != 0, clip_ratio])`, scalars under the normaliser of `loss_type`.

    The sequence-level ratio ("sequence") costs no further pass over the logits.
    Raises ValueError for shapes, names and combinations that do not fit.
    """
    impl = choose_impl(impl, logits)
    kl_type = "k3_corrected" if use_bias_correction_kl else "k3"
    loss = token_loss(
        loss_type, kl_type, eps_low, eps_high, delta,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
    )  # fmt: skip
    check_choice("importance_sampling_level", importance_sampling_level, LEVELS)
    if loss_type in ("cispo", "sapo", "vespo") and delta is not None:
        raise ValueError(f"loss_type {loss_type!r} takes no delta; got {delta}")
    if loss_type == "vespo" and importance_sampling_level != "token":
        raise ValueError(f"loss_type 'vespo' has no importance_sampling_level {importance_sampling_level!r}")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp")

    logp = completion_logps(logits, completion_ids, completion_mask, temperature, inplace, impl)
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()

    def counted(name: str, values: Tensor, otherwise: Tensor | float) -> Tensor:
        """[B, L] fp32 from [B], [B, 1] or [B, L], with `otherwise` in place of whatever a masked token holds."""
        if values.shape not in (mask.shape[:1], (len(mask), 1), mask.shape):
            raise ValueError(f"{name} must be [B], [B, 1] or [B, L] of {tuple(mask.shape)}; got {tuple(values.shape)}")
        return torch.where(mask, (values if values.ndim == 2 else values[:, None]).float(), otherwise)

    current = logp.detach()
    log_ratio = logp - (current if old_logp is None else counted("old_logp", old_logp, current))
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    if importance_sampling_level != "token":
        of_row = (log_ratio.sum(-1, keepdim=True) / lengths).expand_as(logp)
        log_ratio = of_row if importance_sampling_level == "sequence" else of_row.detach() + logp - current
    advantage = counted("advantages", advantages, 0.0)
    importance = mask.float() if vllm_is_ratio is None else counted("vllm_is_ratio", vllm_is_ratio, 0.0)
    if loss_type == "vespo":
        vespo = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        row_log_ratio = log_ratio.detach().clamp(-20, 20).sum(-1, keepdim=True)
        if vllm_is_ratio is not None:
            once = vllm_is_ratio.view(len(mask), -1)
            once = once if once.shape != mask.shape else torch.where(mask, once, 1.0)
            row_log_ratio = row_log_ratio + bounded_log(once).sum(-1, keepdim=True)
        importance = vespo.weight(row_log_ratio, advantage) * mask
    tokens = Tokens(
        token_ids=completion_ids,
        temperature=current,
        advantage=advantage,
        policy_weight=importance,
        kl_weight=beta * mask,
        old_logps=current,
        ref_logps=torch.full_like(logp, SELF) if ref_logp is None else counted("ref_logp", ref_logp, SELF),
    )
    per_token_loss, terms = _TokenLoss.apply(logp, log_ratio, tokens, loss)
    kl, is_clipped = terms[TERMS.index("kl")], terms[TERMS.index("clip_low")] + terms[TERMS.index("clip_high")]
    if not reduce:
        return per_token_loss, kl if beta != 0 else None, is_clipped
    batch, length = completion_ids.shape
    if loss_type == "luspo":
        weights = lengths * mask / (batch * length)
    else:
        counts_items = loss_type in ("dapo", "cispo", "vespo")
        num_items = items_per_process(mask, num_items_in_batch) if counts_items else None
        weights = token_weights(loss_type, mask, lengths, batch, num_items, max_completion_length or length)
    num_tokens = mask.sum().clamp(min=1)
    metrics = [is_clipped.sum() / num_tokens]
    return (per_token_loss * weights).sum(), [kl.sum() / num_tokens, *metrics] if beta != 0 else metrics


def items_per_process(mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    """Tokens of the batch, as given or counted over all processes, divided by the number of processes: as in TRL."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items_in_batch is None:
        num_items = mask.sum().float()
        if distributed:
            dist.all_reduce(num_items)
    else:
        num_items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return num_items / (dist.get_world_size() if distributed else 1)

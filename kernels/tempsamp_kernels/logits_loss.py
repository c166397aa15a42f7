"""The GRPO loss of logits that a trainer holds already, under the name and arguments of Liger-Kernel's function."""

import torch
import torch.distributed as dist
import triton

from tempsamp_kernels.grpo import token_weights
from tempsamp_kernels.logits import completion_logps
from tempsamp_kernels.logits_kernels import token_loss_kernel
from tempsamp_kernels.objectives import TokenLoss, token_loss
from tempsamp_kernels.sequences import LOG_SMALLEST_WEIGHT, Vespo
from tempsamp_kernels.tokens import choose_impl

BLOCK = 1024


def _token_loss_torch(logp, log_ratio, ref_logp, advantage, policy_weight, kl_weight, loss: TokenLoss):
    value, d_logp, d_log_ratio = loss.objective.torch(logp, log_ratio, advantage, *loss.bounds)
    kl, kl_d_logp, kl_d_log_ratio = loss.kl.torch(ref_logp - logp, log_ratio)
    ratio, (lower, upper, *_) = log_ratio.exp(), loss.bounds
    is_clipped = ((ratio < lower) & (advantage < 0)) | ((ratio > upper) & (advantage > 0))
    return (
        policy_weight * value + kl_weight * kl,
        kl,
        is_clipped.float(),
        policy_weight * d_logp + kl_weight * kl_d_logp,
        policy_weight * d_log_ratio + kl_weight * kl_d_log_ratio,
    )


def _token_loss_triton(logp, log_ratio, ref_logp, advantage, policy_weight, kl_weight, loss: TokenLoss):
    output = logp.new_empty(5, *logp.shape)
    if logp.numel():
        fields = [field.contiguous() for field in (logp, log_ratio, ref_logp, advantage, policy_weight, kl_weight)]
        token_loss_kernel[(triton.cdiv(logp.numel(), BLOCK),)](
            *fields, output, logp.numel(), *loss.bounds, loss.objective.triton, loss.kl.triton, BLOCK
        )
    return output.unbind()


class _TokenLoss(torch.autograd.Function):
    """Loss, KL and clip flag of every token, fp32 [B, L]; the loss is differentiable in logp and in log_ratio."""

    @staticmethod
    def forward(ctx, logp, log_ratio, ref_logp, advantage, policy_weight, kl_weight, loss, impl):
        token_loss = {"triton": _token_loss_triton, "torch": _token_loss_torch}[impl]
        value, kl, is_clipped, d_logp, d_log_ratio = token_loss(
            logp, log_ratio, ref_logp, advantage, policy_weight, kl_weight, loss
        )
        ctx.save_for_backward(d_logp, d_log_ratio)
        ctx.mark_non_differentiable(kl, is_clipped)
        return value, kl, is_clipped

    @staticmethod
    def backward(ctx, d_value, *_):
        d_logp, d_log_ratio = ctx.saved_tensors
        return d_value * d_logp, d_value * d_log_ratio, None, None, None, None, None, None


def triton_grpo_loss(
    logits: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
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
    vllm_is_ratio: torch.Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | torch.Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
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
    loss = token_loss(
        loss_type,
        "k3_corrected" if use_bias_correction_kl else "k3",
        eps_low,
        eps_high,
        delta,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
    )
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level {importance_sampling_level!r} is not one of ('token', 'sequence')")
    if loss_type in ("cispo", "sapo", "vespo") and (delta is not None or importance_sampling_level == "sequence"):
        raise ValueError(f"loss_type {loss_type!r} has neither delta nor importance_sampling_level 'sequence'")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp")

    logp = completion_logps(logits, completion_ids, completion_mask, temperature, inplace, impl)
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()

    def counted(values: torch.Tensor, otherwise: torch.Tensor | float) -> torch.Tensor:
        """[B, L] fp32 from [B], [B, 1] or [B, L], with `otherwise` in place of whatever a masked token holds."""
        return torch.where(mask, (values if values.ndim == 2 else values[:, None]).float(), otherwise)

    current = logp.detach()
    log_ratio = logp - (current if old_logp is None else counted(old_logp, current))
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / lengths).expand_as(logp)
    advantage = counted(advantages, 0.0)
    importance = mask.float() if vllm_is_ratio is None else counted(vllm_is_ratio, 0.0)
    if loss_type == "vespo":
        vespo = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)
        row_log_ratio = log_ratio.detach().clamp(-20, 20).sum(-1, keepdim=True) + _row_log_importance(
            vllm_is_ratio, mask
        )
        importance = counted(vespo.weight(row_log_ratio, advantage), 0.0)
    per_token_loss, kl, is_clipped = _TokenLoss.apply(
        logp,
        log_ratio,
        current if ref_logp is None else counted(ref_logp, current),
        advantage,
        importance,
        beta * mask,
        loss,
        impl,
    )
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


def _row_log_importance(vllm_is_ratio: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | float:
    """[B, 1]: log of a completion's importance weight, given once or per token."""
    if vllm_is_ratio is None:
        return 0.0
    per_token = vllm_is_ratio.ndim == 2 and vllm_is_ratio.shape == mask.shape
    ratio = torch.where(mask, vllm_is_ratio, 1.0) if per_token else vllm_is_ratio.view(-1, 1)
    return ratio.float().log().clamp(LOG_SMALLEST_WEIGHT, 20).sum(-1, keepdim=True)


def items_per_process(mask: torch.Tensor, num_items_in_batch: float | torch.Tensor | None) -> torch.Tensor:
    """Tokens of the batch, as given or counted over all processes, divided by the number of processes: as in TRL."""
    distributed = dist.is_available() and dist.is_initialized()
    if num_items_in_batch is None:
        num_items = mask.sum().float()
        if distributed:
            dist.all_reduce(num_items)
    else:
        num_items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return num_items / (dist.get_world_size() if distributed else 1)

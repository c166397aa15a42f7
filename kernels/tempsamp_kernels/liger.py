"""Liger-Kernel's two GRPO losses, from hidden states and from logits, by their names and rules, on these kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels.grpo import LossPlan, run
from tempsamp_kernels.inputs import check_choice, check_head, check_positive, check_token_ids, known_logps, spread
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.logits import fused_selective_log_softmax
from tempsamp_kernels.logprob import linear_logprob
from tempsamp_kernels.metrics import summarise
from tempsamp_kernels.objectives import SELF, TokenLoss, Vespo, bounded_log, token_loss
from tempsamp_kernels.reference import evaluate
from tempsamp_kernels.sequences import Sequences
from tempsamp_kernels.tokens import SKIP, TERMS, HeadOptions, RowStatistics, Tokens
from tempsamp_kernels.weights import live_tokens, token_weights

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "luspo", "dapo", "cispo", "sapo", "vespo")


class FusedLinearGRPOLoss(torch.nn.Module):
    """In place of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` (0.8.5): same arguments, loss and gradients.

    `compiled` and `chunk_size` (in sequences) steer Liger's own chunking and have no bearing here, nor has `delta` in
    "cispo", "sapo" and "vespo". For "cispo" `epsilon_high` is the bound of the ratio itself. Raises ValueError for what
    Liger refuses, too, when it is made.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
        impl: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("loss_type", loss_type, LOSS_TYPES)
        check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        check_positive(temperature=temperature)
        if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"loss_type {loss_type!r} has no importance_sampling_level 'sequence'")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        self.beta, self.loss_type, self.temperature, self.impl = beta, loss_type, temperature, impl
        self.use_ref_model, self.compiled, self.chunk_size = use_ref_model, compiled, chunk_size
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self._token_loss()

    def _token_loss(self) -> TokenLoss:
        """By the attributes as they are by now."""
        return token_loss(
            self.loss_type,
            "k3_corrected" if self.use_bias_correction_kl else "k3",
            self.epsilon_low,
            self.epsilon_high,
            None if self.loss_type in ("cispo", "sapo", "vespo") else self.delta,
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of completions in a padded batch.

        Args:
            _input: [B, T, H]; lin_weight: [V, H]; bias: [V].
            selected_token_ids, attention_mask: [B, T].
            advantages: [B] or [B, T].
            ref_per_token_logps, old_per_token_logps: [B, T].
            ref_input, ref_weight, ref_bias: the reference's head, where its log-probs are not given.
            vllm_is_ratio: [B], [B, 1] or [B, T].
            num_items_in_batch: tokens of the whole batch over all processes, for "dapo", "cispo" and "vespo".

        Returns:
            `(loss, (kl, clip_ratio))`, without `kl` where beta is 0.
        """
        check_head(_input, lin_weight, selected_token_ids, bias)
        batch, length = selected_token_ids.shape
        flat_ids, device = selected_token_ids.reshape(-1), _input.device
        shares_ratio = self.importance_sampling_level == "sequence"
        for name, values in {
            "attention_mask": attention_mask,
            "ref_per_token_logps": ref_per_token_logps,
            "old_per_token_logps": old_per_token_logps,
        }.items():
            _check_shape(name, values, (batch, length))
        _check_shape("vllm_is_ratio", vllm_is_ratio, (batch,), (batch, 1), (batch, length))
        _check_shape("advantages", advantages, (batch,), (batch, length))
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn("Using ref_per_token_logps, and not ref_input: both were given", stacklevel=2)
        if self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model needs ref_per_token_logps, or ref_input and ref_weight")
            with torch.no_grad():
                ref_per_token_logps, _ = linear_logprob(
                    ref_input.reshape(batch, length, ref_weight.shape[1]),
                    ref_weight,
                    selected_token_ids,
                    bias=ref_bias,
                    temperature=self.temperature,
                    impl=self.impl,
                )
        counted = attention_mask.reshape(-1).bool()
        row_ids = torch.arange(batch, device=device).repeat_interleave(length)
        lengths = attention_mask.bool().sum(1).clamp(min=1).float()[row_ids]
        # Liger's "luspo" multiplies by the row's length and averages over every position, masked ones included
        counts_padding = self.loss_type == "luspo"
        kl_weight = self._weights(counted, lengths, batch, length, num_items_in_batch)
        broadcasts = self.beta != 0 or (vllm_is_ratio is not None and vllm_is_ratio.shape == (batch, length))
        policy_weight = kl_weight
        if counts_padding and shares_ratio and not broadcasts:
            policy_weight = counted / batch
        if vllm_is_ratio is not None:
            vllm_is_ratio = (vllm_is_ratio[:, None] if vllm_is_ratio.ndim == 1 else vllm_is_ratio).float()
            if self.loss_type != "vespo":
                policy_weight = policy_weight * vllm_is_ratio.expand(batch, length).reshape(-1)
        read = torch.ones_like(counted) if counts_padding else counted
        references = ref_per_token_logps if self.use_ref_model and self.beta != 0 else None
        level = "row" if advantages.ndim == 1 else "token"
        advantage = spread("advantages", advantages.reshape(-1), row_ids, batch, level)
        tokens = Tokens(
            token_ids=flat_ids.masked_fill(~read, SKIP),
            temperature=spread("temperature", self.temperature, row_ids, batch),
            advantage=advantage.masked_fill(~read, 0),
            policy_weight=policy_weight,
            kl_weight=self.beta * kl_weight,
            old_logps=known_logps(_flat(old_per_token_logps), read, "old_per_token_logps"),
            ref_logps=known_logps(_flat(references), read, "ref_per_token_logps"),
        )
        check_token_ids(flat_ids, read, len(lin_weight))
        impl = choose_impl(self.impl, _input)
        sequences = None
        if shares_ratio:
            sequences = Sequences(row_ids, batch, counted, lengths)
        elif self.loss_type == "vespo" and not (old_per_token_logps is None and vllm_is_ratio is None):
            sequences = Sequences(row_ids, batch, counted, lengths, self._weighted_vespo(vllm_is_ratio))
        options = HeadOptions(bias, impl=impl)
        plan = LossPlan(tokens, read, options, self._token_loss(), None, batch * length, sequences)
        live = live_tokens(read, advantage, references is not None, shared_by=row_ids if shares_ratio else None)
        loss, terms = run(plan, _input.reshape(batch * length, _input.shape[-1]), lin_weight, bias, live)
        metrics = summarise(terms, counted, torch.zeros_like(counted))
        clip_ratio = metrics["clip_low"] + metrics["clip_high"]
        return loss, (metrics["kl"], clip_ratio) if self.beta != 0 else (clip_ratio,)

    def _weights(
        self, counted: Tensor, lengths: Tensor, batch: int, length: int, num_items_in_batch: float | Tensor | None
    ) -> Tensor:
        if self.loss_type == "luspo":
            return counted.view(batch, length).sum(1, keepdim=True).expand(batch, length).reshape(-1) / (batch * length)
        num_items = None
        if self.loss_type in ("dapo", "cispo", "vespo"):
            num_items = items_per_process(counted, num_items_in_batch)
        return token_weights(self.loss_type, counted, lengths, batch, num_items, self.max_completion_length)

    def _weighted_vespo(self, vllm_is_ratio: Tensor | None) -> Vespo:
        """VESPO's weight with a row's importance weights multiplied in."""
        weight = 0.0 if vllm_is_ratio is None else bounded_log(vllm_is_ratio).sum(1)
        return Vespo(self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg, weight)


def _check_shape(name: str, values: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if values is not None and values.shape not in shapes:
        raise ValueError(
            f"{name} must be {' or '.join(str(list(shape)) for shape in shapes)}; got {list(values.shape)}"
        )


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)


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
    check_choice("loss_type", loss_type, LOSS_TYPES)
    kl_type = "k3_corrected" if use_bias_correction_kl else "k3"
    loss = token_loss(
        loss_type, kl_type, eps_low, eps_high, delta,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg,
        level=importance_sampling_level,
    )  # fmt: skip
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp")

    if completion_ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise ValueError(f"logits {tuple(logits.shape)} must be [B, L + 1, V] for ids {tuple(completion_ids.shape)}")
    logp = fused_selective_log_softmax(logits, completion_ids, temperature, completion_mask, inplace=inplace, impl=impl)
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()

    def counted(name: str, values: Tensor, otherwise: Tensor | float, may_be_of_rows: bool = False) -> Tensor:
        """[B, L] fp32 from [B, L], or [B] or [B, 1], with `otherwise` in place of whatever a masked token holds."""
        _check_shape(name, values, mask.shape, *[mask.shape[:1], (len(mask), 1)] * may_be_of_rows)
        return torch.where(mask, (values if values.ndim == 2 else values[:, None]).float(), otherwise)

    current = logp.detach()
    log_ratio = logp - (current if old_logp is None else counted("old_logp", old_logp, current))
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    if importance_sampling_level != "token":
        of_row = (log_ratio.sum(-1, keepdim=True) / lengths).expand_as(logp)
        log_ratio = of_row if importance_sampling_level == "sequence" else of_row.detach() + logp - current
    advantage = counted("advantages", advantages, 0.0, may_be_of_rows=True)
    importance = mask.float()
    if vllm_is_ratio is not None:
        importance = counted("vllm_is_ratio", vllm_is_ratio, 0.0, may_be_of_rows=True)
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

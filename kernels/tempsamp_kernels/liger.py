"""Liger-Kernel's fused GRPO loss, by its names and rules, on these kernels: 6NHV FLOPs where it takes 8."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tempsamp_kernels.grpo import LossPlan, run
from tempsamp_kernels.inputs import check_choice, check_head, check_positive, check_token_ids, known_logps, spread
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.logits_loss import items_per_process
from tempsamp_kernels.logprob import linear_logprob
from tempsamp_kernels.metrics import summarise
from tempsamp_kernels.objectives import token_loss
from tempsamp_kernels.sequences import Sequences, Vespo
from tempsamp_kernels.tokens import SKIP, HeadOptions, Tokens
from tempsamp_kernels.weights import bounded_log, live_tokens, token_weights


class FusedLinearGRPOLoss(torch.nn.Module):
    """In place of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss` (0.8.5): same arguments, loss and gradients.

    `compiled` and `chunk_size` (in sequences) steer Liger's own chunking and have no bearing here. For "cispo"
    `epsilon_high` is the bound of the ratio itself. Raises ValueError for what Liger refuses, too.
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
        self.loss = token_loss(
            loss_type,
            "k3_corrected" if use_bias_correction_kl else "k3",
            epsilon_low,
            epsilon_high,
            delta,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
        )
        check_choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
        check_positive("temperature", temperature)
        if importance_sampling_level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"loss_type {loss_type!r} has no importance_sampling_level 'sequence'")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("loss_type 'dr_grpo' needs max_completion_length")
        self.beta, self.loss_type, self.temperature, self.impl = beta, loss_type, temperature, impl
        self.use_ref_model = use_ref_model
        self.max_completion_length = max_completion_length
        self.shares_ratio = importance_sampling_level == "sequence"
        self.vespo = Vespo(vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg)

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
        if self.use_ref_model and ref_per_token_logps is None:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model needs ref_per_token_logps, or ref_input and ref_weight")
            with torch.no_grad():
                ref_per_token_logps, _ = linear_logprob(
                    ref_input.reshape(batch, length, -1),
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
        if counts_padding and self.shares_ratio and not broadcasts:
            policy_weight = counted / batch
        if vllm_is_ratio is not None:
            vllm_is_ratio = vllm_is_ratio.reshape(batch, -1).float()
            if self.loss_type != "vespo":
                policy_weight = policy_weight * vllm_is_ratio.expand(batch, length).reshape(-1)
        read = torch.ones_like(counted) if counts_padding else counted
        references = ref_per_token_logps if self.use_ref_model and self.beta != 0 else None
        if advantages.shape not in ((batch,), (batch, length)):
            raise ValueError(f"advantages must be [{batch}] or [{batch}, {length}]; got {tuple(advantages.shape)}")
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
        if self.shares_ratio:
            sequences = Sequences(row_ids, batch, counted, lengths, impl)
        elif self.loss_type == "vespo" and not (old_per_token_logps is None and vllm_is_ratio is None):
            sequences = Sequences(row_ids, batch, counted, lengths, impl, self._weighted_vespo(vllm_is_ratio))
        options = HeadOptions(bias, impl=impl)
        plan = LossPlan(tokens, read, options, self.loss, None, batch * length, sequences)
        live = live_tokens(read, advantage, references is not None, shared_by=row_ids if self.shares_ratio else None)
        loss, terms = run(plan, _input.reshape(batch * length, -1), lin_weight, bias, live)
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
        if vllm_is_ratio is None:
            return self.vespo
        return replace(self.vespo, log_weight=bounded_log(vllm_is_ratio).sum(1))


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)

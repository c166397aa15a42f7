"""What each token counts for: masks, normalisers, and which tokens can have a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.inputs import check_vector, on_host
from tempsamp_kernels.tokens import Tokens


def token_mask(mask: Tensor | None, row_mask: Tensor | None, row_ids: Tensor, device: torch.device) -> Tensor:
    """[N] bool: unmasked tokens of completions that count, on the CPU if all inputs are."""
    home = row_ids.device if on_host(mask, row_mask, row_ids) else device
    counts = torch.ones(len(row_ids), dtype=torch.bool, device=home)
    if mask is not None:
        check_vector("mask", mask, len(row_ids))
        counts &= mask.to(home, torch.bool, non_blocking=True)
    if row_mask is not None:
        counts &= row_mask.to(home, torch.bool, non_blocking=True)[row_ids.to(home, non_blocking=True)]
    return counts


def live_tokens(mask: Tensor, advantage: Tensor, always: bool, shared_by: Tensor | None = None) -> Tensor | None:
    """[N] bool on the CPU: tokens that may have a gradient, or None where only the device could tell.

    Without a KL term or entropy bonus (`always` False) that takes a nonzero advantage: the token's own, or that of any
    token in its row where `shared_by` [N] says which tokens share a ratio.
    """
    if not on_host(advantage, mask, shared_by):
        return None
    live = mask if always else mask & (advantage != 0)
    if shared_by is None or not len(live):
        return live
    learns = torch.zeros(int(shared_by.max()) + 1, dtype=torch.bool)
    learns[shared_by[live]] = True
    return mask & learns[shared_by]


def row_lengths(mask: Tensor, row_ids: Tensor, num_row_ids: int) -> Tensor:
    """[N] fp32: unmasked tokens in the row of each token, at least 1."""
    counts = torch.zeros(num_row_ids, device=mask.device).index_add_(0, row_ids, mask.float())
    return counts.clamp(min=1)[row_ids]


def token_weights(
    loss_type: str, mask: Tensor, lengths: Tensor, num_rows: float | Tensor,
    num_items_in_batch: float | Tensor | None, max_completion_length: int | None,
) -> Tensor:  # fmt: skip
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


def slopes(tokens: Tokens) -> Tensor:
    """[N]: about as much as the derivatives with respect to log-probs can be, at a ratio of 1."""
    entropy_weight = 0.0 if tokens.entropy_weight is None else tokens.entropy_weight.abs()
    return tokens.policy_weight * tokens.advantage.abs() + tokens.kl_weight.abs() + entropy_weight

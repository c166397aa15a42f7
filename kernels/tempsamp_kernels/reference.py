"""The plain PyTorch twins of the row kernels: complete, chunk by chunk, and fast enough to train small models."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.objectives import (
    KL_ESTIMATORS,
    OBJECTIVES,
    TokenLoss,
    difference,
    on_tensors,
    token_terms,
    weighted,
)
from tempsamp_kernels.tokens import SKIP, HeadOptions, RowStatistics, Tokens


def scale_logits_(logits: Tensor, tokens: Tokens, head: HeadOptions) -> Tensor:
    """Bias, scale, softcap and temperature on raw logits [C, V] fp32, in place."""
    if head.bias is not None:
        logits += head.bias[: logits.shape[1]]
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits.div_(tokens.temperature[:, None])


def softmax_statistics(scaled: Tensor, token_ids: Tensor, with_entropy: bool = True) -> RowStatistics:
    """Log-prob, entropy and log-sum-exp of each row of `scaled` logits [C, V]; 0 for a row to skip.

    The target is left out of the sum: where it leads, `logp = -log1p(sum of the others' odds)` keeps its digits
    where `target - lse` would round to exactly 0. Without entropy the logits are overwritten.
    """
    index = token_ids.masked_fill(token_ids == SKIP, 0)[:, None]
    target = scaled.gather(1, index)[:, 0]
    others = scaled.scatter(1, index, -torch.inf) if with_entropy else scaled.scatter_(1, index, -torch.inf)
    peak = others.amax(1).clamp(min=-1e30)
    others.sub_(peak[:, None]).clamp_(min=-1e4)
    weights = others.exp() if with_entropy else others.exp_()
    total = weights.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    lead = (target - peak).masked_fill(target == torch.inf, torch.nan)
    ahead = -torch.log1p(total * (-lead.clamp(min=0)).exp())
    lse = torch.where(lead > 0, lead - ahead, (total + lead.clamp(max=0).exp()).log())  # above the peak
    logp = torch.where(lead > 0, ahead, lead - lse)
    entropy = torch.zeros_like(logp)
    if with_entropy:
        mean_shifted = others.mul_(weights).sum(1) / total
        entropy = -on_tensors(weighted)(logp.exp(), logp) - torch.expm1(logp) * (lse - mean_shifted)
    found = RowStatistics(logp, entropy, torch.where(lead > 0, target - logp, peak + lse))
    return found.map(lambda values: values.masked_fill(token_ids == SKIP, 0.0))


def softmax_gradient_(
    scaled: Tensor, tokens: Tokens, head: HeadOptions, rows: RowStatistics, d_logp: Tensor, d_entropy: Tensor | None
) -> Tensor:
    """Overwrite `scaled` logits [C, V] with d loss / d raw logits, given d loss / d logp and / d entropy [C]."""
    factor = head.logit_scale / tokens.temperature
    slope = None
    if head.softcap is not None:
        slope = 1 - (scaled * (tokens.temperature[:, None] / head.softcap)).square_()
    at_target = -torch.expm1(rows.logp) * d_logp
    if d_entropy is None:
        scaled.sub_(rows.lse[:, None]).exp_().mul_(-(d_logp * factor)[:, None])
    else:
        at_target -= d_entropy * on_tensors(weighted)(rows.logp.exp(), rows.logp + rows.entropy)
        log_probs = scaled.sub_(rows.lse[:, None]).clamp_(min=-1e4)
        probs = log_probs.exp()
        log_probs.add_(rows.entropy[:, None]).mul_((d_entropy * factor)[:, None]).add_((d_logp * factor)[:, None])
        log_probs.mul_(probs.neg_())
    index = tokens.token_ids.masked_fill(tokens.token_ids == SKIP, 0)[:, None]
    scaled.scatter_(1, index, (at_target * factor)[:, None])
    return scaled if slope is None else scaled.mul_(slope)


def evaluate(
    rows: RowStatistics, log_ratio: Tensor, tokens: Tokens, loss: TokenLoss
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Evaluate the loss of each token, in fields of any one shape [...].

    Returns the terms [NUM_TERMS, ...] (see `tokens.TERMS`), d loss / d logp, / d log_ratio and / d entropy, the last
    one None without an entropy bonus.
    """
    weight, threshold = tokens.entropy_weight, tokens.entropy_threshold
    *values, d_logp, d_log_ratio, d_entropy = on_tensors(token_terms)(
        rows.logp, rows.entropy, log_ratio, tokens.ref_logps, tokens.advantage, tokens.policy_weight, tokens.kl_weight,
        torch.zeros_like(rows.logp) if weight is None else weight, -torch.inf if threshold is None else threshold,
        **loss.numbers(), OBJECTIVE=on_tensors(OBJECTIVES[loss.objective]), KL=on_tensors(KL_ESTIMATORS[loss.kl]),
    )  # fmt: skip
    terms = torch.stack([rows.logp, rows.entropy, *values])
    return terms, d_logp, d_log_ratio, None if weight is None else d_entropy


def token_log_ratio(logp: Tensor, tokens: Tokens) -> Tensor:
    """log(pi / pi_old) of each token; 0 where the old log-prob is the current one."""
    return on_tensors(difference)(logp, tokens.old_logps)


def row_statistics(logits: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics of raw logits [C, V] fp32, which are overwritten."""
    return softmax_statistics(scale_logits_(logits, tokens, head), tokens.token_ids)


def row_gradient(
    logits: Tensor, tokens: Tokens, head: HeadOptions, rows: RowStatistics, d_logp: Tensor, d_entropy: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """The gradient of raw logits [C, V] fp32, in `out`; the logits are overwritten."""
    scaled = scale_logits_(logits, tokens, head)
    out.copy_(softmax_gradient_(scaled, tokens, head, rows, d_logp, d_entropy))


def row_loss(
    logits: Tensor, tokens: Tokens, head: HeadOptions, loss: TokenLoss, out: Tensor,
    gradient_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loss terms [NUM_TERMS, C] of raw logits [C, V] fp32, which are overwritten; their gradient in `out`.

    The gradient, not the loss, is multiplied by `gradient_scale` [1].
    """
    scaled = scale_logits_(logits, tokens, head)
    rows = softmax_statistics(scaled, tokens.token_ids)
    terms, d_logp, d_log_ratio, d_entropy = evaluate(rows, token_log_ratio(rows.logp, tokens), tokens, loss)
    d_logp = d_logp + d_log_ratio
    if gradient_scale is not None:
        d_logp, d_entropy = d_logp * gradient_scale, None if d_entropy is None else d_entropy * gradient_scale
    out.copy_(softmax_gradient_(scaled, tokens, head, rows, d_logp, d_entropy))
    return terms

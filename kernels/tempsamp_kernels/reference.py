"""The plain PyTorch twins of the kernels: complete, chunk by chunk, and fast enough to train small models on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.objectives import SELF, TokenLoss
from tempsamp_kernels.tokens import NUM_TERMS, HeadOptions, RowStatistics, Tokens


def scale_logits_(logits: Tensor, tokens: Tokens, head: HeadOptions) -> Tensor:
    """Bias, scale, softcap and temperature on raw logits [C, V] fp32, in place."""
    if head.bias is not None:
        logits += head.bias
    if head.logit_scale != 1.0:
        logits *= head.logit_scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits.div_(tokens.temperature[:, None])


def softmax_statistics(scaled: Tensor, token_ids: Tensor) -> RowStatistics:
    """Log-prob, entropy and log-sum-exp of each row of `scaled` logits [C, V].

    The target is left out of the sum: where it leads, `logp = -log1p(sum of the others' odds)` keeps its digits
    where `target - lse` would round to exactly 0.
    """
    index = token_ids[:, None]
    target = scaled.gather(1, index)[:, 0]
    others = scaled.scatter(1, index, -torch.inf)
    peak = others.amax(1).clamp(min=-1e30)
    others.sub_(peak[:, None]).clamp_(min=-1e4)
    weights = others.exp()
    total = weights.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    mean_shifted = others.mul_(weights).sum(1) / total
    lead = target - peak
    behind = lead - (total + lead.clamp(max=0).exp()).log()
    logp = torch.where(lead > 0, -torch.log1p(total * (-lead.clamp(min=0)).exp()), behind)
    gap = total.log() - lead
    entropy = -logp.exp() * logp - torch.expm1(logp) * (total.log() - logp - gap - mean_shifted)
    return RowStatistics(logp, entropy, target - logp)


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
        at_target -= d_entropy * rows.logp.exp() * (rows.logp + rows.entropy)
        log_probs = scaled.sub_(rows.lse[:, None]).clamp_(min=-1e4)
        probs = log_probs.exp()
        log_probs.add_(rows.entropy[:, None]).mul_((d_entropy * factor)[:, None]).add_((d_logp * factor)[:, None])
        log_probs.mul_(probs.neg_())
    scaled.scatter_(1, tokens.token_ids[:, None], (at_target * factor)[:, None])
    return scaled if slope is None else scaled.mul_(slope)


def token_terms(
    logp: Tensor, entropy: Tensor, log_ratio: Tensor, tokens: Tokens, loss: TokenLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the loss of each token.

    Returns the terms [NUM_TERMS, C] (see `tokens.TERMS`) and d loss / d logp and / d log_ratio [C].
    """
    value, d_logp, d_log_ratio = loss.objective.torch(logp, log_ratio, tokens.advantage, *loss.bounds)
    delta = torch.where(tokens.ref_logps == SELF, 0.0, tokens.ref_logps - logp)
    kl, kl_d_logp, kl_d_log_ratio = loss.kl.torch(delta, log_ratio)
    ratio = log_ratio.exp()
    lower, upper = loss.bounds[:2]
    terms = torch.stack(
        [
            logp,
            entropy,
            tokens.policy_weight * value + tokens.kl_weight * kl,
            kl,
            ratio,
            ((ratio < lower) & (tokens.advantage < 0)).float(),
            ((ratio > upper) & (tokens.advantage > 0)).float(),
        ]
    )
    assert len(terms) == NUM_TERMS
    return (
        terms,
        tokens.policy_weight * d_logp + tokens.kl_weight * kl_d_logp,
        tokens.policy_weight * d_log_ratio + tokens.kl_weight * kl_d_log_ratio,
    )


def token_log_ratio(logp: Tensor, tokens: Tokens) -> Tensor:
    """log(pi / pi_old) of each token; 0 where the old log-prob is the current one."""
    return torch.where(tokens.old_logps == SELF, 0.0, logp - tokens.old_logps)


def row_statistics(logits: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics of raw logits [C, V] fp32, which are overwritten."""
    return softmax_statistics(scale_logits_(logits, tokens, head), tokens.token_ids)


def row_gradient(
    logits: Tensor,
    tokens: Tokens,
    head: HeadOptions,
    rows: RowStatistics,
    d_logp: Tensor,
    d_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of raw logits [C, V] fp32 as `dtype`; the logits are overwritten."""
    scaled = scale_logits_(logits, tokens, head)
    return softmax_gradient_(scaled, tokens, head, rows, d_logp, d_entropy).to(dtype)


def row_loss(
    logits: Tensor, tokens: Tokens, head: HeadOptions, loss: TokenLoss, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss terms [NUM_TERMS, C] of raw logits [C, V] fp32 and their gradient as `dtype`; the logits are overwritten."""
    scaled = scale_logits_(logits, tokens, head)
    rows = softmax_statistics(scaled, tokens.token_ids)
    log_ratio = token_log_ratio(rows.logp, tokens)
    terms, d_logp, d_log_ratio = token_terms(rows.logp, rows.entropy, log_ratio, tokens, loss)
    return terms, softmax_gradient_(scaled, tokens, head, rows, d_logp + d_log_ratio, None).to(dtype)

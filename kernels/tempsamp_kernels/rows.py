"""The Triton row kernels: softmax statistics, loss and gradient, one program per row of logits [C, V].

The vocabulary is read in blocks, its tail masked. Statistics are fp32 and leave the target out of the sum, so that
`logp = -log1p(sum of the others' odds)` keeps its digits for confident tokens. Only the dtypes, the options' presence
and V's block size are compiled in: batch, temperature and clip bounds never recompile anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempsamp_kernels.objectives import TokenLoss
from tempsamp_kernels.tokens import NUM_TERMS, HeadOptions, RowStatistics, Tokens

WIDTH = tl.constexpr(4)
"""Neighbouring columns that share one running maximum: as many fp32 as one vectorised load brings."""


def row_blocks(vocab_size: int) -> dict[str, int]:
    """Launch options by vocabulary size: lanes of a statistics block, columns of a gradient block, warps."""
    columns = min(4096, max(16, triton.next_power_of_2(vocab_size)))
    return {"LANES": columns // 4, "BLOCK": columns, "num_warps": 8 if columns == 4096 else 4}


@triton.jit
def log1p_triton(u):
    """log(1 + u) for u in [0, 1] to the last digits, where log rounds 1 + u first: 2 atanh(u / (2 + u))."""
    s = u / (2 + u)
    q = s * s
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))


@triton.jit
def expm1_triton(x):
    """exp(x) - 1, by its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def adjusted(z, bias_ptr, columns, inside, logit_scale, softcap, inv_temperature):
    """Raw fp32 logits after bias, scale, softcap and temperature, and the slope of the last three."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    z *= logit_scale
    slope = logit_scale * inv_temperature
    if softcap is not None:
        squashed = 2 * tl.sigmoid(2 * z / softcap) - 1
        z = softcap * squashed
        slope *= 1 - squashed * squashed
    return z * inv_temperature, slope


@triton.jit
def _scaled(row_ptr, bias_ptr, columns, inside, logit_scale, softcap, inv_temperature):
    """`adjusted` logits of one row in memory."""
    z = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return adjusted(z, bias_ptr, columns, inside, logit_scale, softcap, inv_temperature)


@triton.jit
def absorbed(peak, total, weighted, z):
    """Running statistics of each lane with one more block of its logits, `z` [lanes, columns]; see `merged`."""
    new_peak = tl.maximum(peak, tl.max(z, axis=1))
    fall = peak - new_peak
    shifted = tl.maximum(z - new_peak[:, None], -1e4, propagate_nan=tl.PropagateNan.ALL)
    weights = tl.exp(shifted)
    weighted = tl.exp(fall) * (weighted + total * fall) + tl.sum(weights * shifted, axis=1)
    return new_peak, tl.exp(fall) * total + tl.sum(weights, axis=1), weighted


@triton.jit
def merged(peak, total, weighted, target):
    """(logp, entropy, lse) of one row from its target logit and the statistics of several lanes.

    A lane has the maximum of its logits but the target, the sum of their exponentials relative to it, and that sum
    weighted by their distances to it.
    """
    row_peak = tl.max(peak, axis=0)
    fall = tl.maximum(peak - row_peak, -1e4)
    row_weighted = tl.sum(tl.exp(fall) * (weighted + total * fall), axis=0)
    row_total = tl.maximum(tl.sum(tl.exp(fall) * total, axis=0), 1.2e-38)
    lead = target - row_peak
    odds = row_total * tl.exp(-tl.maximum(lead, 0.0))
    ahead = -tl.where(odds < 1, log1p_triton(tl.minimum(odds, 1.0)), tl.log(1 + odds))
    logp = tl.where(lead > 0, ahead, lead - tl.log(row_total + tl.exp(tl.minimum(lead, 0.0))))
    log_total = tl.log(row_total)
    gap = log_total - lead
    entropy = -tl.exp(logp) * logp + tl.sigmoid(gap) * (log_total - logp - gap - row_weighted / row_total)
    return logp, entropy, target - logp


@triton.jit
def _statistics(
    row_ptr,
    bias_ptr,
    token_id,
    vocab_size,
    logit_scale,
    softcap,
    inv_temperature,
    LANES: tl.constexpr,
):
    """(logp, entropy, lse) of one row; every lane keeps its own maximum and sums until the row ends.

    NaN for a token outside the vocabulary.
    """
    peak = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab_size, LANES * WIDTH):
        columns = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        inside = columns < vocab_size
        z, _ = _scaled(row_ptr, bias_ptr, columns, inside, logit_scale, softcap, inv_temperature)
        z = tl.where(inside & (columns != token_id), z, float("-inf"))
        peak, total, weighted = absorbed(peak, total, weighted, z)
    known = (token_id >= 0) & (token_id < vocab_size)
    target, _ = _scaled(row_ptr, bias_ptr, token_id, known, logit_scale, softcap, inv_temperature)
    return merged(peak, total, weighted, tl.where(known, target, float("nan")))


@triton.jit
def _write_gradient(
    row_ptr,
    gradient_ptr,
    bias_ptr,
    token_id,
    vocab_size,
    logit_scale,
    softcap,
    inv_temperature,
    logp,
    entropy,
    lse,
    d_logp,
    d_entropy,
    BLOCK: tl.constexpr,
):
    """Gradient of one row's raw logits, which may be written over the logits themselves, in fewer bytes too."""
    at_target = -expm1_triton(logp) * d_logp
    if d_entropy is not None:
        at_target -= d_entropy * tl.exp(logp) * (logp + entropy)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        z, slope = _scaled(row_ptr, bias_ptr, columns, inside, logit_scale, softcap, inv_temperature)
        log_prob = z - lse
        if d_entropy is not None:
            gradient = -tl.exp(log_prob) * (d_logp + d_entropy * (tl.maximum(log_prob, -1e4) + entropy))
        else:
            gradient = -tl.exp(log_prob) * d_logp
        gradient = tl.where(columns == token_id, at_target, gradient) * slope
        # What is written here may be a logit that another warp has yet to read: the target's, for the statistics, or,
        # under narrower elements, one of this block.
        tl.debug_barrier()
        tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def row_statistics_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    statistics_ptr,
    statistics_stride,
    vocab_size,
    logit_scale,
    softcap,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics [3, C]: log-prob, entropy, log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, token_id = logits_ptr + row * logits_stride, tl.load(token_ids_ptr + row)
    inv_temperature = 1 / tl.load(temperature_ptr + row)
    logp, entropy, lse = _statistics(
        row_ptr, bias_ptr, token_id, vocab_size, logit_scale, softcap, inv_temperature, LANES
    )  # fmt: skip
    tl.store(statistics_ptr + row, logp)
    tl.store(statistics_ptr + statistics_stride + row, entropy)
    tl.store(statistics_ptr + 2 * statistics_stride + row, lse)


@triton.jit
def row_gradient_kernel(
    logits_ptr,
    logits_stride,
    gradient_ptr,
    gradient_stride,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    d_logp_ptr,
    d_entropy_ptr,
    vocab_size,
    logit_scale,
    softcap,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient [C, V] of raw logits from known statistics; `d_entropy_ptr` may be None."""
    row = tl.program_id(0).to(tl.int64)
    d_entropy = None
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
    row_ptr, token_id = logits_ptr + row * logits_stride, tl.load(token_ids_ptr + row)
    inv_temperature = 1 / tl.load(temperature_ptr + row)
    logp, entropy, lse = tl.load(logp_ptr + row), tl.load(entropy_ptr + row), tl.load(lse_ptr + row)
    _write_gradient(
        row_ptr, gradient_ptr + row * gradient_stride, bias_ptr, token_id, vocab_size, logit_scale, softcap,
        inv_temperature, logp, entropy, lse, tl.load(d_logp_ptr + row), d_entropy, BLOCK,
    )  # fmt: skip


@triton.jit
def row_loss_kernel(
    logits_ptr,
    logits_stride,
    gradient_ptr,
    gradient_stride,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    advantage_ptr,
    policy_weight_ptr,
    kl_weight_ptr,
    old_logps_ptr,
    ref_logps_ptr,
    terms_ptr,
    terms_stride,
    vocab_size,
    logit_scale,
    softcap,
    lower,
    upper,
    first,
    second,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything about a row while its logits are at hand: loss terms [NUM_TERMS, C] and gradient [C, V]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, token_id = logits_ptr + row * logits_stride, tl.load(token_ids_ptr + row)
    inv_temperature = 1 / tl.load(temperature_ptr + row)
    logp, entropy, lse = _statistics(
        row_ptr, bias_ptr, token_id, vocab_size, logit_scale, softcap, inv_temperature, LANES
    )  # fmt: skip
    advantage = tl.load(advantage_ptr + row)
    policy_weight = tl.load(policy_weight_ptr + row)
    kl_weight = tl.load(kl_weight_ptr + row)
    old_logp = tl.load(old_logps_ptr + row)
    ref_logp = tl.load(ref_logps_ptr + row)
    log_ratio = tl.where(old_logp == float("inf"), 0.0, logp - old_logp)
    delta = tl.where(ref_logp == float("inf"), 0.0, ref_logp - logp)
    loss, d_logp, d_log_ratio = OBJECTIVE(logp, log_ratio, advantage, lower, upper, first, second)
    kl, kl_d_logp, kl_d_log_ratio = KL(delta, log_ratio)
    ratio = tl.exp(log_ratio)
    terms_ptr += row
    tl.store(terms_ptr, logp)
    tl.store(terms_ptr + terms_stride, entropy)
    tl.store(terms_ptr + 2 * terms_stride, policy_weight * loss + kl_weight * kl)
    tl.store(terms_ptr + 3 * terms_stride, kl)
    tl.store(terms_ptr + 4 * terms_stride, ratio)
    tl.store(terms_ptr + 5 * terms_stride, ((ratio < lower) & (advantage < 0)).to(tl.float32))
    tl.store(terms_ptr + 6 * terms_stride, ((ratio > upper) & (advantage > 0)).to(tl.float32))
    coefficient = policy_weight * (d_logp + d_log_ratio) + kl_weight * (kl_d_logp + kl_d_log_ratio)
    _write_gradient(
        row_ptr, gradient_ptr + row * gradient_stride, bias_ptr, token_id, vocab_size, logit_scale, softcap,
        inv_temperature, logp, entropy, lse, coefficient, None, BLOCK,
    )  # fmt: skip


def _gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of `logits` [C, V] fp32 as a gradient of another dtype: each row keeps its place."""
    return logits.view(dtype)[:, : logits.shape[1]]


def _common(logits: Tensor, head: HeadOptions) -> dict[str, object]:
    """Arguments that all row kernels take."""
    return {
        "bias_ptr": head.bias,
        "vocab_size": logits.shape[1],
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        **row_blocks(logits.shape[1]),
    }


def row_statistics(logits: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics of raw logits [C, V] fp32."""
    statistics = torch.empty(3, len(logits), device=logits.device)
    row_statistics_kernel[(len(logits),)](
        logits_ptr=logits,
        logits_stride=logits.stride(0),
        token_ids_ptr=tokens.token_ids,
        temperature_ptr=tokens.temperature,
        statistics_ptr=statistics,
        statistics_stride=statistics.stride(0),
        **_common(logits, head),
    )
    return RowStatistics(*statistics)


def row_gradient(
    logits: Tensor,
    tokens: Tokens,
    head: HeadOptions,
    rows: RowStatistics,
    d_logp: Tensor,
    d_entropy: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of raw logits [C, V] fp32 as `dtype`, in their memory."""
    gradient = _gradient_view(logits, dtype)
    row_gradient_kernel[(len(logits),)](
        logits_ptr=logits,
        logits_stride=logits.stride(0),
        gradient_ptr=gradient,
        gradient_stride=gradient.stride(0),
        token_ids_ptr=tokens.token_ids,
        temperature_ptr=tokens.temperature,
        logp_ptr=rows.logp,
        entropy_ptr=rows.entropy,
        lse_ptr=rows.lse,
        d_logp_ptr=d_logp,
        d_entropy_ptr=d_entropy,
        **_common(logits, head),
    )
    return gradient


def row_loss(
    logits: Tensor, tokens: Tokens, head: HeadOptions, loss: TokenLoss, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss terms [NUM_TERMS, C] of raw logits [C, V] fp32 and their gradient as `dtype`, in their memory."""
    terms = torch.empty(NUM_TERMS, len(logits), device=logits.device)
    gradient = _gradient_view(logits, dtype)
    lower, upper, first, second = loss.bounds
    row_loss_kernel[(len(logits),)](
        logits_ptr=logits,
        logits_stride=logits.stride(0),
        gradient_ptr=gradient,
        gradient_stride=gradient.stride(0),
        token_ids_ptr=tokens.token_ids,
        temperature_ptr=tokens.temperature,
        advantage_ptr=tokens.advantage,
        policy_weight_ptr=tokens.policy_weight,
        kl_weight_ptr=tokens.kl_weight,
        old_logps_ptr=tokens.old_logps,
        ref_logps_ptr=tokens.ref_logps,
        terms_ptr=terms,
        terms_stride=terms.stride(0),
        lower=lower,
        upper=upper,
        first=first,
        second=second,
        OBJECTIVE=loss.objective.triton,
        KL=loss.kl.triton,
        **_common(logits, head),
    )
    return terms, gradient

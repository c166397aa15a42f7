"""The Triton row kernels: softmax statistics, loss and gradient, one program per row of logits.

Logits are [C, V] or [B, T, V] with any strides but the last. The vocabulary is read in blocks, its tail masked.
Statistics are fp32 and leave the target out of the sum, so that `logp = -log1p(sum of the others' odds)` keeps its
digits for confident tokens. Only the dtypes, the options' presence and the block sizes are compiled in: batch,
temperature and clip bounds never recompile anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_kernels.launch import launch
from tempsamp_kernels.objectives import TokenLoss, difference, least, most, token_terms
from tempsamp_kernels.optional_triton import tl, triton
from tempsamp_kernels.tokens import NUM_TERMS, SKIP, HeadOptions, RowStatistics, Tokens, aligned

_SKIP = tl.constexpr(SKIP)


@triton.jit
def log1p(u):
    """log(1 + u) for u in [0, 1] to the last digits, where log rounds 1 + u first: 2 atanh(u / (2 + u))."""
    s = u / (2 + u)
    q = s * s
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13)))))))


@triton.jit
def expm1(x):
    """exp(x) - 1, by its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def row_of(ptr, row, length, batch_stride, row_stride):
    """Where row `row` of [B, length, V] starts."""
    return ptr + row // length * batch_stride + row % length * row_stride


@triton.jit
def scores(row_ptr, bias_ptr, columns, stored, logit_scale, softcap, inv_temperature):
    """Logits of one row after bias, scale, softcap and temperature, and the slope of the last three."""
    z = tl.load(row_ptr + columns, mask=stored, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=stored, other=0.0)
    logit_scale = tl.cast(logit_scale, tl.float32)  # torch.compile passes Python's floats as fp64
    z *= logit_scale
    slope = logit_scale * inv_temperature
    if softcap is not None:
        softcap = tl.cast(softcap, tl.float32)
        squashed = 2 * tl.sigmoid(2 * z / softcap) - 1
        z = softcap * squashed
        slope *= 1 - squashed * squashed
    return z * inv_temperature, slope


@triton.jit
def statistics(
    row_ptr, bias_ptr, token_id, vocab_size, stored_size, logit_scale, softcap, inv_temperature, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """(logp, entropy, lse) of one row: NaN for a token outside the vocabulary, 0 for one to skip.

    Every lane keeps, over WIDTH neighbouring columns of each block, the maximum of its logits but the target, the sum
    of their exponentials relative to it, and that sum weighted by their distances to it, until the row ends. What is
    no number reaches the sums, though a GPU's maximum drops it.
    """
    peak = tl.full([LANES], -1e30, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    is_read = token_id != _SKIP
    for start in range(0, tl.where(is_read, vocab_size, 0), LANES * WIDTH):
        columns = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        z, _ = scores(row_ptr, bias_ptr, columns, columns < stored_size, logit_scale, softcap, inv_temperature)
        z = tl.where((columns < vocab_size) & (columns != token_id), z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        fall = peak - new_peak
        shifted = most(z - new_peak[:, None], -1e4)
        weights = tl.exp(shifted)
        weighted = tl.exp(fall) * (weighted + total * fall) + tl.sum(weights * shifted, axis=1)
        total = tl.exp(fall) * total + tl.sum(weights, axis=1)
        peak = new_peak

    known = (token_id >= 0) & (token_id < vocab_size)
    target, _ = scores(row_ptr, bias_ptr, token_id, known, logit_scale, softcap, inv_temperature)
    target = tl.where(known, target, float("nan"))
    row_peak = tl.max(peak, axis=0)
    fall = most(peak - row_peak, -1e4)
    row_weighted = tl.sum(tl.exp(fall) * (weighted + total * fall), axis=0)
    row_total = most(tl.sum(tl.exp(fall) * total, axis=0), 1.2e-38)
    lead = target - row_peak
    odds = row_total * tl.exp(-most(lead, 0.0))
    ahead = -tl.where(odds < 1, log1p(least(odds, 1.0)), tl.log(1 + odds))
    logp = tl.where(lead > 0, ahead, lead - tl.log(row_total + tl.exp(least(lead, 0.0))))
    log_total = tl.log(row_total)
    gap = log_total - lead
    entropy = -tl.exp(logp) * logp + tl.sigmoid(gap) * (log_total - logp - gap - row_weighted / row_total)
    return tl.where(is_read, logp, 0.0), tl.where(is_read, entropy, 0.0), tl.where(is_read, target - logp, 0.0)


@triton.jit
def write_gradient(
    row_ptr, gradient_ptr, bias_ptr, token_id, vocab_size, stored_size, logit_scale, softcap, inv_temperature, logp,
    entropy, lse, d_logp, d_entropy, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one row's raw logits, which may be written over the logits themselves.

    Backwards, so that what the statistics read last is still in the L2 cache. A row without a gradient is written as
    zeros and not read, so that nothing in it can leak.
    """
    at_target = -expm1(logp) * d_logp
    is_live = d_logp != 0
    if d_entropy is not None:
        at_target -= d_entropy * tl.exp(logp) * (logp + entropy)
        is_live = is_live | (d_entropy != 0)
    readable, lse = tl.where(is_live, stored_size, 0), tl.where(is_live, lse, 0.0)
    at_target = tl.where(is_live, at_target, 0.0)
    last = (vocab_size - 1) // BLOCK * BLOCK
    for start in range(0, vocab_size, BLOCK):
        columns = last - start + tl.arange(0, BLOCK)
        z, slope = scores(row_ptr, bias_ptr, columns, columns < readable, logit_scale, softcap, inv_temperature)
        log_prob = z - lse
        if d_entropy is not None:
            gradient = -tl.exp(log_prob) * (d_logp + d_entropy * (most(log_prob, -1e4) + entropy))
        else:
            gradient = -tl.exp(log_prob) * d_logp
        gradient = tl.where(columns == token_id, at_target, gradient) * slope
        tl.store(gradient_ptr + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=columns < stored_size)


@triton.jit(do_not_specialize=["length"])
def row_statistics_kernel(
    logits_ptr, length, batch_stride, row_stride, bias_ptr, token_ids_ptr, temperature_ptr, statistics_ptr,
    statistics_stride, vocab_size, stored_size, logit_scale, softcap, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics [3, rows]: log-prob, entropy, log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    logp, entropy, lse = statistics(
        row_of(logits_ptr, row, length, batch_stride, row_stride), bias_ptr, tl.load(token_ids_ptr + row), vocab_size,
        stored_size, logit_scale, softcap, 1 / tl.load(temperature_ptr + row), LANES, WIDTH,
    )  # fmt: skip
    tl.store(statistics_ptr + row, logp)
    tl.store(statistics_ptr + statistics_stride + row, entropy)
    tl.store(statistics_ptr + 2 * statistics_stride + row, lse)


@triton.jit(do_not_specialize=["length"])
def row_gradient_kernel(
    logits_ptr, length, batch_stride, row_stride, gradient_ptr, gradient_batch_stride, gradient_row_stride, bias_ptr,
    token_ids_ptr, temperature_ptr, logp_ptr, entropy_ptr, lse_ptr, d_logp_ptr, d_entropy_ptr, vocab_size, stored_size,
    logit_scale, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of raw logits from known statistics; `d_entropy_ptr` may be None."""
    row = tl.program_id(0).to(tl.int64)
    d_entropy = None
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row)
    write_gradient(
        row_of(logits_ptr, row, length, batch_stride, row_stride),
        row_of(gradient_ptr, row, length, gradient_batch_stride, gradient_row_stride),
        bias_ptr, tl.load(token_ids_ptr + row), vocab_size, stored_size, logit_scale, softcap,
        1 / tl.load(temperature_ptr + row), tl.load(logp_ptr + row), tl.load(entropy_ptr + row),
        tl.load(lse_ptr + row), tl.load(d_logp_ptr + row), d_entropy, BLOCK,
    )  # fmt: skip


@triton.jit
def row_loss_kernel(
    logits_ptr, row_stride, gradient_ptr, gradient_row_stride, bias_ptr, token_ids_ptr, temperature_ptr, advantage_ptr,
    policy_weight_ptr, kl_weight_ptr, old_logps_ptr, ref_logps_ptr, entropy_weight_ptr, entropy_threshold_ptr,
    gradient_scale_ptr, terms_ptr, terms_stride, vocab_size, stored_size, logit_scale, softcap, ratio_low, ratio_high,
    option_1, option_2, log_ratio_bound, kl_bound, OBJECTIVE: tl.constexpr, KL: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything about a row of [C, V] while its logits are at hand: loss terms [NUM_TERMS, C] and gradient."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr, token_id = logits_ptr + row * row_stride, tl.load(token_ids_ptr + row)
    inv_temperature = 1 / tl.load(temperature_ptr + row)
    logp, entropy, lse = statistics(
        row_ptr, bias_ptr, token_id, vocab_size, stored_size, logit_scale, softcap, inv_temperature, LANES, WIDTH
    )  # fmt: skip
    entropy_weight, entropy_threshold = 0.0, float("-inf")
    if entropy_weight_ptr is not None:
        entropy_weight = tl.load(entropy_weight_ptr + row)
    if entropy_threshold_ptr is not None:
        entropy_threshold = tl.load(entropy_threshold_ptr + row)
    loss, kl, ratio, clip_low, clip_high, d_logp, d_log_ratio, d_entropy = token_terms(
        logp, entropy, difference(logp, tl.load(old_logps_ptr + row)), tl.load(ref_logps_ptr + row),
        tl.load(advantage_ptr + row), tl.load(policy_weight_ptr + row), tl.load(kl_weight_ptr + row),
        entropy_weight, entropy_threshold, tl.cast(ratio_low, tl.float32), tl.cast(ratio_high, tl.float32),
        tl.cast(option_1, tl.float32), tl.cast(option_2, tl.float32), tl.cast(log_ratio_bound, tl.float32),
        tl.cast(kl_bound, tl.float32), OBJECTIVE, KL,
    )  # fmt: skip
    terms_ptr += row
    tl.store(terms_ptr, logp)
    tl.store(terms_ptr + terms_stride, entropy)
    tl.store(terms_ptr + 2 * terms_stride, loss)
    tl.store(terms_ptr + 3 * terms_stride, kl)
    tl.store(terms_ptr + 4 * terms_stride, ratio)
    tl.store(terms_ptr + 5 * terms_stride, clip_low)
    tl.store(terms_ptr + 6 * terms_stride, clip_high)
    d_logp += d_log_ratio
    if gradient_scale_ptr is not None:
        d_logp *= tl.load(gradient_scale_ptr)
        d_entropy *= tl.load(gradient_scale_ptr)
    if entropy_weight_ptr is None:
        d_entropy = None
    tl.debug_barrier()  # for gradients over the logits: every warp has read the target's
    write_gradient(
        row_ptr, gradient_ptr + row * gradient_row_stride, bias_ptr, token_id, vocab_size, stored_size, logit_scale,
        softcap, inv_temperature, logp, entropy, lse, d_logp, d_entropy, BLOCK,
    )  # fmt: skip


def row_blocks(vocab_size: int, element_size: int = 4) -> dict[str, int]:
    """Columns of a block, lanes and columns per lane of a statistics block (16 bytes in one load), and warps.

    A long row has all threads of a multiprocessor: the fewer rows at a time, the more of each is still in the L2 cache
    when its gradient reads it again.
    """
    columns = min(16384, max(16, triton.next_power_of_2(vocab_size)))
    width = 16 // element_size
    return {"LANES": columns // width, "WIDTH": width, "BLOCK": columns, "num_warps": max(4, columns // 512)}


def _arguments(logits: Tensor, tokens: Tokens, head: HeadOptions, *blocks: str) -> dict[str, object]:
    """What all row kernels take; `blocks` are the block sizes that this one does."""
    vocab_size = logits.shape[-1]
    is_padded = logits.ndim == 2 and logits.stride(0) == aligned(vocab_size)
    sizes = row_blocks(vocab_size, logits.element_size())
    return {
        "logits_ptr": logits,
        "row_stride": logits.stride(-2),
        "bias_ptr": head.bias,
        "token_ids_ptr": tokens.token_ids,
        "temperature_ptr": tokens.temperature,
        "vocab_size": vocab_size,
        # Up to where a row may be read and written: with room to spare, every access moves 16 bytes at once.
        "stored_size": aligned(vocab_size) if is_padded else vocab_size,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        **{name: sizes[name] for name in (*blocks, "num_warps")},
    }


def _layout(logits: Tensor) -> dict[str, int]:
    """How rows follow each other: [C, V] as one batch."""
    return {"length": logits.shape[-2], "batch_stride": logits.stride(0) if logits.ndim == 3 else 0}


def row_statistics(logits: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics [rows] of raw logits, [C, V] in rows of `aligned(V)` or [B, T, V], which stay as they are."""
    num_rows = logits.shape[:-1].numel()
    found = torch.empty(3, num_rows, device=logits.device)
    launch(
        row_statistics_kernel, (num_rows,), **_arguments(logits, tokens, head, "LANES", "WIDTH"), **_layout(logits),
        statistics_ptr=found, statistics_stride=found.stride(0),
    )  # fmt: skip
    return RowStatistics(*found)


def row_gradient(
    logits: Tensor, tokens: Tokens, head: HeadOptions, rows: RowStatistics, d_logp: Tensor, d_entropy: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """The gradient of raw logits, in `out`: the logits themselves, or other rows of `aligned(V)`."""
    launch(
        row_gradient_kernel, (logits.shape[:-1].numel(),), **_arguments(logits, tokens, head, "BLOCK"),
        **_layout(logits), gradient_ptr=out, gradient_row_stride=out.stride(-2),
        gradient_batch_stride=out.stride(0) if out.ndim == 3 else 0, logp_ptr=rows.logp, entropy_ptr=rows.entropy,
        lse_ptr=rows.lse, d_logp_ptr=d_logp, d_entropy_ptr=d_entropy,
    )  # fmt: skip


def row_loss(
    logits: Tensor, tokens: Tokens, head: HeadOptions, loss: TokenLoss, out: Tensor,
    gradient_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loss terms [NUM_TERMS, C] of raw logits [C, V] fp32; their gradient is written to `out`, as in `row_gradient`.

    The gradient, not the loss, is multiplied by `gradient_scale` [1].
    """
    terms = torch.empty(NUM_TERMS, len(logits), device=logits.device)
    launch(
        row_loss_kernel, (len(logits),), **_arguments(logits, tokens, head, "LANES", "WIDTH", "BLOCK"),
        gradient_ptr=out, gradient_row_stride=out.stride(0), advantage_ptr=tokens.advantage,
        policy_weight_ptr=tokens.policy_weight, kl_weight_ptr=tokens.kl_weight, old_logps_ptr=tokens.old_logps,
        ref_logps_ptr=tokens.ref_logps, entropy_weight_ptr=tokens.entropy_weight,
        entropy_threshold_ptr=tokens.entropy_threshold, gradient_scale_ptr=gradient_scale, terms_ptr=terms,
        terms_stride=terms.stride(0), **loss.numbers(), OBJECTIVE=loss.objective, KL=loss.kl,
    )  # fmt: skip
    return terms

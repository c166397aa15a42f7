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
from tempsamp_kernels.objectives import (
    KL_ESTIMATORS,
    OBJECTIVES,
    TokenLoss,
    difference,
    least,
    most,
    token_terms,
    weighted,
)
from tempsamp_kernels.optional_triton import tl, triton
from tempsamp_kernels.tokens import NUM_TERMS, SKIP, HeadOptions, RowStatistics, Tokens, aligned

_SKIP = tl.constexpr(SKIP)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


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
    """Logits of one row after bias, scale, softcap and temperature, in bits, and the slope of all of that in nats.

    In bits because a GPU's exponential is of base 2.
    """
    z = tl.load(row_ptr + columns, mask=stored, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=stored, other=0.0)
    slope = tl.cast(logit_scale, tl.float32) * inv_temperature  # torch.compile passes Python's floats as fp64
    if softcap is None:
        z *= slope * LOG2_E
    else:
        softcap = tl.cast(softcap, tl.float32)
        squashed = 2 * tl.sigmoid(z * (2 * tl.cast(logit_scale, tl.float32) / softcap)) - 1
        z = squashed * (softcap * inv_temperature * LOG2_E)
        slope *= 1 - squashed * squashed
    return z, slope


@triton.jit
def column_of(token_id, vocab_size):
    """The target's column as int32, -1 for a token outside the vocabulary and for one to skip."""
    return tl.where((token_id >= 0) & (token_id < vocab_size), token_id, -1).to(tl.int32)


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
    distances = tl.zeros([LANES], tl.float32)
    is_read = token_id != _SKIP
    target_column = column_of(token_id, vocab_size)
    for start in range(0, tl.where(is_read, vocab_size, 0), LANES * WIDTH):
        columns = start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        z, _ = scores(row_ptr, bias_ptr, columns, columns < stored_size, logit_scale, softcap, inv_temperature)
        z = tl.where((columns < vocab_size) & (columns != target_column), z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        fall = peak - new_peak
        shifted = most(z - new_peak[:, None], -1e4)
        weights = tl.exp2(shifted)
        distances = tl.exp2(fall) * (distances + total * fall) + tl.sum(weights * shifted, axis=1)
        total = tl.exp2(fall) * total + tl.sum(weights, axis=1)
        peak = new_peak

    known = target_column >= 0
    target, _ = scores(row_ptr, bias_ptr, target_column, known, logit_scale, softcap, inv_temperature)
    target = tl.where(known, target, float("nan")) * LN_2
    row_peak = tl.max(peak, axis=0)
    fall = most(peak - row_peak, -1e4)
    row_distances = tl.sum(tl.exp2(fall) * (distances + total * fall), axis=0) * LN_2
    row_total = most(tl.sum(tl.exp2(fall) * total, axis=0), 1.2e-38)
    lead = tl.where(target == float("inf"), float("nan"), target - row_peak * LN_2)
    odds = row_total * tl.exp(-most(lead, 0.0))
    ahead = -tl.where(odds < 1, log1p(least(odds, 1.0)), tl.log(1 + odds))
    lse = tl.where(lead > 0, lead - ahead, tl.log(row_total + tl.exp(least(lead, 0.0))))  # above the peak
    logp = tl.where(lead > 0, ahead, lead - lse)
    others = tl.sigmoid(tl.log(row_total) - lead)
    entropy = others * (lse - row_distances / row_total) - weighted(tl.exp(logp), logp)
    lse = tl.where(lead > 0, target - logp, row_peak * LN_2 + lse)
    return tl.where(is_read, logp, 0.0), tl.where(is_read, entropy, 0.0), tl.where(is_read, lse, 0.0)


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
        at_target -= d_entropy * weighted(tl.exp(logp), logp + entropy)
        is_live = is_live | (d_entropy != 0)
    readable, lse = tl.where(is_live, stored_size, 0), tl.where(is_live, lse, 0.0) * LOG2_E
    at_target = tl.where(is_live, at_target, 0.0)
    last, target_column = (vocab_size - 1) // BLOCK * BLOCK, column_of(token_id, vocab_size)
    for start in range(0, vocab_size, BLOCK):
        columns = last - start + tl.arange(0, BLOCK)
        z, slope = scores(row_ptr, bias_ptr, columns, columns < readable, logit_scale, softcap, inv_temperature)
        d_score = d_logp * slope
        if d_entropy is not None:
            d_score += d_entropy * (most((z - lse) * LN_2, -1e4) + entropy) * slope
        gradient = tl.where(columns == target_column, at_target * slope, tl.exp2(z - lse) * -d_score)
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


@triton.jit(do_not_specialize=["length"])
def row_loss_kernel(
    logits_ptr, length, batch_stride, row_stride, gradient_ptr, gradient_row_stride, bias_ptr, token_ids_ptr,
    temperature_ptr, advantage_ptr, policy_weight_ptr, kl_weight_ptr, old_logps_ptr, ref_logps_ptr, entropy_weight_ptr,
    entropy_threshold_ptr, gradient_scale_ptr, terms_ptr, terms_stride, vocab_size, stored_size, logit_scale, softcap,
    ratio_low, ratio_high, option_1, option_2, log_ratio_bound, kl_bound, OBJECTIVE: tl.constexpr, KL: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything about rows of [C, V], `length` = C, while they are at hand: loss terms [NUM_TERMS, C] and gradient."""
    for row in range(tl.program_id(0).to(tl.int64), length, tl.num_programs(0)):
        row_ptr = row_of(logits_ptr, row, length, batch_stride, row_stride)
        token_id = tl.load(token_ids_ptr + row)
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
        tl.store(terms_ptr + row, logp)
        tl.store(terms_ptr + terms_stride + row, entropy)
        tl.store(terms_ptr + 2 * terms_stride + row, loss)
        tl.store(terms_ptr + 3 * terms_stride + row, kl)
        tl.store(terms_ptr + 4 * terms_stride + row, ratio)
        tl.store(terms_ptr + 5 * terms_stride + row, clip_low)
        tl.store(terms_ptr + 6 * terms_stride + row, clip_high)
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


def rows_at_work(num_rows: int, vocab_size: int, device: torch.device) -> int:
    """How many rows the loss kernel works at: where all multiprocessors' would not stay in the L2 cache, fewer do.

    So the second reading of the logits finds them there, and GEMMs beside keep multiprocessors. Four in ten of Hopper's
    are assumed to be enough for the memory, by bytes and instructions of a logit; three in four of others.
    """
    if device.type != "cuda":
        return min(num_rows, 5)  # in the interpreter, so that programs of several rows are tested
    chip = torch.cuda.get_device_properties(device)
    fitting = chip.L2_cache_size // (6 * vocab_size)  # 4 bytes read and 2 written
    if fitting >= chip.multi_processor_count:
        return num_rows
    return min(num_rows, max(fitting, int((0.4 if chip.major == 9 else 0.75) * chip.multi_processor_count)))


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
        "length": logits.shape[-2],
        "batch_stride": logits.stride(0) if logits.ndim == 3 else 0,
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


def row_statistics(logits: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics [rows] of raw logits, [C, V] in rows of `aligned(V)` or [B, T, V], which stay as they are."""
    num_rows = logits.shape[:-1].numel()
    found = torch.empty(3, num_rows, device=logits.device)
    launch(
        row_statistics_kernel, (num_rows,), **_arguments(logits, tokens, head, "LANES", "WIDTH"),
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
        gradient_ptr=out, gradient_batch_stride=out.stride(0) if out.ndim == 3 else 0,
        gradient_row_stride=out.stride(-2), logp_ptr=rows.logp, entropy_ptr=rows.entropy,
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
    num_rows, vocab_size = logits.shape
    launch(
        row_loss_kernel, (rows_at_work(num_rows, vocab_size, logits.device),),
        **_arguments(logits, tokens, head, "LANES", "WIDTH", "BLOCK"), gradient_ptr=out,
        gradient_row_stride=out.stride(0), advantage_ptr=tokens.advantage, policy_weight_ptr=tokens.policy_weight,
        kl_weight_ptr=tokens.kl_weight, old_logps_ptr=tokens.old_logps, ref_logps_ptr=tokens.ref_logps,
        entropy_weight_ptr=tokens.entropy_weight, entropy_threshold_ptr=tokens.entropy_threshold,
        gradient_scale_ptr=gradient_scale, terms_ptr=terms, terms_stride=terms.stride(0), **loss.numbers(),
        OBJECTIVE=OBJECTIVES[loss.objective], KL=KL_ESTIMATORS[loss.kl],
    )  # fmt: skip
    return terms

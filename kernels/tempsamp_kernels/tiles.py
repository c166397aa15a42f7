"""Softmax statistics straight from hidden states: tiles of logits live in registers and are never written.

One program owns ROWS tokens and SPAN columns of the vocabulary and keeps what a row's softmax needs of them; a second
kernel merges the spans of each token. The tile order depends on the vocabulary alone, so a token's bits do not depend
on the tokens around it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempsamp_kernels.rows import absorbed, adjusted, merged
from tempsamp_kernels.tokens import HeadOptions, RowStatistics, Tokens

ROWS, COLUMNS, DEPTH, SPAN = 128, 128, 64, 1024
PARTS = 4
"""What a span leaves behind for each token: maximum, sum, weighted sum, target logit (0 where it lies elsewhere)."""


def tiles_beat_gemm(hidden_size: int, dtype: torch.dtype) -> bool:
    """Whether `tile_statistics` should be faster than cuBLAS and the row kernel after it.

    It saves one write and one read of fp32 logits, 8 bytes per logit, and pays with a slower GEMM, 2 * hidden_size
    FLOPs per logit. At 4 TB/s and at 700 against 550 TFLOP/s, which is what Hopper should reach, the two are equal for
    a hidden size of 2,560; fp32 products run without tensor cores here.
    """
    return dtype == torch.bfloat16 and hidden_size <= 2048


@triton.jit(do_not_specialize=["num_tokens"])
def tile_statistics_kernel(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    token_ids_ptr,
    temperature_ptr,
    parts_ptr,
    num_tokens,
    vocab_size,
    hidden_size,
    logit_scale,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Parts [PARTS, number of spans, N] of each token's statistics."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    span = tl.program_id(1).to(tl.int64)
    is_row = rows < num_tokens
    token_id = tl.load(token_ids_ptr + rows, mask=is_row, other=0)
    inv_temperature = 1 / tl.load(temperature_ptr + rows, mask=is_row, other=1.0)
    depth = tl.arange(0, DEPTH)

    peak = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    known = (token_id >= 0) & (token_id < vocab_size)
    target = tl.where(known, 0.0, float("nan"))
    for start in range(0, SPAN, COLUMNS):
        columns = span * SPAN + start + tl.arange(0, COLUMNS)
        inside = columns < vocab_size
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, hidden_size, DEPTH):
            is_deep = first + depth < hidden_size
            x_ptr = hidden_ptr + rows[:, None] * hidden_stride + (first + depth)[None, :]
            w_ptr = weight_ptr + columns[None, :] * weight_stride + (first + depth)[:, None]
            x = tl.load(x_ptr, mask=is_row[:, None] & is_deep[None, :], other=0.0)
            w = tl.load(w_ptr, mask=inside[None, :] & is_deep[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        z, _ = adjusted(
            z, bias_ptr, columns[None, :], inside[None, :], logit_scale, softcap, inv_temperature[:, None]
        )  # fmt: skip
        is_target = columns[None, :] == token_id[:, None]
        target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
        z = tl.where(inside[None, :] & ~is_target, z, float("-inf"))
        peak, total, weighted = absorbed(peak, total, weighted, z)

    parts_ptr += span * num_tokens + rows
    stride = tl.num_programs(1).to(tl.int64) * num_tokens
    tl.store(parts_ptr, peak, mask=is_row)
    tl.store(parts_ptr + stride, total, mask=is_row)
    tl.store(parts_ptr + 2 * stride, weighted, mask=is_row)
    tl.store(parts_ptr + 3 * stride, target, mask=is_row)


@triton.jit(do_not_specialize=["num_tokens", "num_spans"])
def merge_spans_kernel(parts_ptr, statistics_ptr, num_tokens, num_spans, SPANS: tl.constexpr):
    """Statistics [3, N] from parts: log-prob, entropy, log-sum-exp; one program per token."""
    row = tl.program_id(0).to(tl.int64)
    spans = tl.arange(0, SPANS).to(tl.int64)
    is_span = spans < num_spans
    parts_ptr += spans * num_tokens + row
    stride = num_spans.to(tl.int64) * num_tokens
    peak = tl.load(parts_ptr, mask=is_span, other=-1e30)
    total = tl.load(parts_ptr + stride, mask=is_span, other=0.0)
    weighted = tl.load(parts_ptr + 2 * stride, mask=is_span, other=0.0)
    target = tl.sum(tl.load(parts_ptr + 3 * stride, mask=is_span, other=0.0), axis=0)
    logp, entropy, lse = merged(peak, total, weighted, target)
    tl.store(statistics_ptr + row, logp)
    tl.store(statistics_ptr + num_tokens + row, entropy)
    tl.store(statistics_ptr + 2 * num_tokens + row, lse)


def tile_statistics(hidden: Tensor, weight: Tensor, tokens: Tokens, head: HeadOptions) -> RowStatistics:
    """Statistics of `hidden` [N, H] @ `weight` [V, H].T, both of one dtype: 2NHV FLOPs, 16 bytes per 1,024 logits."""
    hidden, weight = (each if each.stride(-1) == 1 else each.contiguous() for each in (hidden, weight))
    num_tokens, (vocab_size, hidden_size) = len(hidden), weight.shape
    num_spans = triton.cdiv(vocab_size, SPAN)
    parts = torch.empty(PARTS, num_spans, num_tokens, device=hidden.device)
    statistics = torch.empty(3, num_tokens, device=hidden.device)
    if num_tokens:
        tile_statistics_kernel[triton.cdiv(num_tokens, ROWS), num_spans](
            hidden, hidden.stride(0), weight, weight.stride(0), head.bias, tokens.token_ids, tokens.temperature, parts,
            num_tokens, vocab_size, hidden_size, head.logit_scale, head.softcap,
            ROWS, COLUMNS, DEPTH, SPAN, num_warps=8, num_stages=3,
        )  # fmt: skip
        merge_spans_kernel[(num_tokens,)](
            parts, statistics, num_tokens, num_spans, SPANS=triton.next_power_of_2(num_spans)
        )
    return RowStatistics(*statistics)

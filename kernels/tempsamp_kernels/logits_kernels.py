"""Triton kernels at the logits level: one program owns one row, reads it once forward, reads and writes it backward."""

import triton
import triton.language as tl

from tempsamp_kernels.rows import log1p_triton


@triton.jit(do_not_specialize=["length"])
def logits_logprob_kernel(
    logits_ptr,
    token_ids_ptr,
    logp_ptr,
    lse_ptr,
    margin_ptr,
    inv_temperature,
    length,
    batch_stride,
    row_stride,
    vocab,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Row statistics of logits [B, >=length, vocab]; a negative token id marks a row that is neither read nor counted.

    Every lane keeps its own running maximum and sum over WIDTH neighbouring columns: one exponential per element and a
    single reduction across lanes at the end of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + row)
    live = token_id >= 0
    row_ptr = logits_ptr + row // length * batch_stride + row % length * row_stride
    inv_temperature = tl.cast(inv_temperature, tl.float32)

    peak = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, tl.where(live, vocab, 0), LANES * WIDTH):
        columns = start + tl.arange(0, LANES * WIDTH)
        z = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32) * inv_temperature
        z = tl.reshape(tl.where(columns == token_id, float("-inf"), z), [LANES, WIDTH])
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = new_peak

    row_peak = tl.max(peak, axis=0)
    base = tl.where(row_peak == float("-inf"), 0.0, row_peak)
    log_total = tl.log(tl.sum(total * tl.exp(peak - base), axis=0))
    # A token id past the vocabulary must not read a neighbour's memory: its log-prob is NaN.
    target = tl.load(row_ptr + token_id, mask=live & (token_id < vocab), other=float("nan")).to(tl.float32)
    target = target * inv_temperature
    margin = (base - target) + log_total
    logp = -(tl.maximum(margin, 0.0) + log1p_triton(tl.exp(-tl.abs(margin))))
    tl.store(logp_ptr + row, tl.where(live, logp, 0.0))
    tl.store(lse_ptr + row, tl.where(live, target - logp, 0.0))
    tl.store(margin_ptr + row, tl.where(live, margin, 0.0))


@triton.jit(do_not_specialize=["length"])
def logits_gradient_kernel(
    logits_ptr,
    grad_logits_ptr,
    token_ids_ptr,
    lse_ptr,
    margin_ptr,
    grad_logp_ptr,
    inv_temperature,
    length,
    batch_stride,
    row_stride,
    grad_batch_stride,
    grad_row_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    """grad_logits = grad_logp / temperature * (onehot - softmax), which may overwrite the logits themselves.

    A row whose incoming gradient is exactly 0 is written as zeros without being read, so NaN in it cannot leak.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // length, row % length
    row_ptr = logits_ptr + batch * batch_stride + position * row_stride
    grad_row_ptr = grad_logits_ptr + batch * grad_batch_stride + position * grad_row_stride
    inv_temperature = tl.cast(inv_temperature, tl.float32)
    token_id = tl.load(token_ids_ptr + row)
    scale = tl.load(grad_logp_ptr + row) * inv_temperature
    live = (token_id >= 0) & (scale != 0.0)
    scale = tl.where(live, scale, 0.0)
    lse = tl.load(lse_ptr + row)
    # sigmoid(margin) is 1 - p of the target, without the cancellation of 1 - exp(logp).
    target_gradient = scale * tl.sigmoid(tl.load(margin_ptr + row))
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + columns, mask=(columns < vocab) & live, other=float("-inf")).to(tl.float32)
        gradient = tl.where(columns == token_id, target_gradient, -scale * tl.exp(z * inv_temperature - lse))
        tl.store(grad_row_ptr + columns, gradient.to(grad_logits_ptr.dtype.element_ty), mask=columns < vocab)


@triton.jit(do_not_specialize=["num_tokens"])
def token_loss_kernel(
    logp_ptr,
    log_ratio_ptr,
    ref_logp_ptr,
    advantage_ptr,
    policy_weight_ptr,
    kl_weight_ptr,
    output_ptr,
    num_tokens,
    lower,
    upper,
    first,
    second,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss, KL, clip flag, d loss / d logp and d loss / d log_ratio of flat tokens into output [5, num_tokens]."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    logp = tl.load(logp_ptr + token, mask=inside, other=0.0)
    log_ratio = tl.load(log_ratio_ptr + token, mask=inside, other=0.0)
    advantage = tl.load(advantage_ptr + token, mask=inside, other=0.0)
    policy_weight = tl.load(policy_weight_ptr + token, mask=inside, other=0.0)
    kl_weight = tl.load(kl_weight_ptr + token, mask=inside, other=0.0)
    delta = tl.load(ref_logp_ptr + token, mask=inside, other=0.0) - logp
    loss, d_logp, d_log_ratio = OBJECTIVE(logp, log_ratio, advantage, lower, upper, first, second)
    kl, kl_d_logp, kl_d_log_ratio = KL(delta, log_ratio)
    ratio = tl.exp(log_ratio)
    is_clipped = ((ratio < lower) & (advantage < 0)) | ((ratio > upper) & (advantage > 0))
    tl.store(output_ptr + token, policy_weight * loss + kl_weight * kl, mask=inside)
    tl.store(output_ptr + num_tokens + token, kl, mask=inside)
    tl.store(output_ptr + 2 * num_tokens + token, is_clipped.to(tl.float32), mask=inside)
    tl.store(output_ptr + 3 * num_tokens + token, policy_weight * d_logp + kl_weight * kl_d_logp, mask=inside)
    tl.store(output_ptr + 4 * num_tokens + token, policy_weight * d_log_ratio + kl_weight * kl_d_log_ratio, mask=inside)

"""Log-probabilities for trainers that hold the logits already.

Forward reads the logits once; backward reads them once and writes their gradient once, over the logits if asked to.
"""

import torch
from torch.nn import functional as F

from tempsamp_kernels.logits_kernels import logits_gradient_kernel, logits_logprob_kernel
from tempsamp_kernels.tokens import check_temperature, choose_impl

ROWS_PER_CHUNK = 256


def _row_chunks(*tensors: torch.Tensor):
    """Views of at most ROWS_PER_CHUNK rows of one batch entry, for [B, T, ...] tensors of any strides."""
    for entries in zip(*tensors, strict=True):
        yield from zip(*(entry.split(ROWS_PER_CHUNK) for entry in entries), strict=True)


def _logprob_torch(logits, token_ids, inv_temperature):
    logp, lse, margin = (torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3))
    for z, ids, logp_rows, lse_rows, margin_rows in _row_chunks(logits, token_ids, logp, lse, margin):
        live, index = ids >= 0, ids.clamp(min=0).unsqueeze(-1)
        z = z.float() * inv_temperature
        target = z.gather(-1, index).squeeze(-1)
        peak = z.scatter_(-1, index, -torch.inf).amax(-1).clamp(min=-1e30)
        log_total = z.sub_(peak.unsqueeze(-1)).exp_().sum(-1).log()
        margin_rows.copy_((peak - target + log_total).where(live, 0))
        logp_rows.copy_((-F.softplus(margin_rows)).where(live, 0))
        lse_rows.copy_((target - logp_rows).where(live, 0))
    return logp, lse, margin


def _gradient_torch(logits, grad_logits, token_ids, lse, margin, grad_logp, inv_temperature):
    rows = _row_chunks(logits, grad_logits, token_ids, lse, margin, grad_logp)
    for z, grad_rows, ids, lse_rows, margin_rows, grad_logp_rows in rows:
        scale = (grad_logp_rows * inv_temperature).unsqueeze(-1)
        gradient = -scale * torch.exp(z.float() * inv_temperature - lse_rows.unsqueeze(-1))
        gradient.scatter_(-1, ids.clamp(min=0).unsqueeze(-1), scale * torch.sigmoid(margin_rows).unsqueeze(-1))
        grad_rows.copy_(gradient.where(((ids >= 0) & (grad_logp_rows != 0)).unsqueeze(-1), 0))


def _logprob_triton(logits, token_ids, inv_temperature):
    logp, lse, margin = (torch.empty(token_ids.shape, dtype=torch.float32, device=logits.device) for _ in range(3))
    if token_ids.numel():
        logits_logprob_kernel[(token_ids.numel(),)](
            logits, token_ids, logp, lse, margin, inv_temperature,
            logits.shape[1], logits.stride(0), logits.stride(1), logits.shape[2],
            LANES=512, WIDTH=8, num_warps=8,
        )  # fmt: skip
    return logp, lse, margin


def _gradient_triton(logits, grad_logits, token_ids, lse, margin, grad_logp, inv_temperature):
    if token_ids.numel():
        logits_gradient_kernel[(token_ids.numel(),)](
            logits, grad_logits, token_ids, lse, margin, grad_logp, inv_temperature,
            logits.shape[1], logits.stride(0), logits.stride(1), grad_logits.stride(0), grad_logits.stride(1),
            logits.shape[2], BLOCK=4096, num_warps=8,
        )  # fmt: skip


_IMPLEMENTATIONS = {"triton": (_logprob_triton, _gradient_triton), "torch": (_logprob_torch, _gradient_torch)}


class _RowLogProb(torch.autograd.Function):
    """log p(token) of every row of logits [B, T, V], fp32 [B, T]; rows with a negative token id give 0."""

    @staticmethod
    def forward(ctx, logits, token_ids, temperature, inplace, impl):
        logprob, ctx.gradient = _IMPLEMENTATIONS[impl]
        ctx.inv_temperature, ctx.inplace = 1.0 / temperature, inplace
        logp, lse, margin = logprob(logits, token_ids, ctx.inv_temperature)
        ctx.save_for_backward(logits, token_ids, lse, margin)
        return logp

    @staticmethod
    def backward(ctx, grad_logp):
        logits, token_ids, lse, margin = ctx.saved_tensors
        grad_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.gradient(logits, grad_logits, token_ids, lse, margin, grad_logp.contiguous(), ctx.inv_temperature)
        if ctx.inplace:
            # Whoever still needs the logits, this function included, gets autograd's error instead of their gradient.
            torch.autograd.graph.increment_version(logits)
        return grad_logits, None, None, None, None


def completion_logps(logits, completion_ids, completion_mask, temperature, inplace, impl):
    """fp32 [B, L] log-probabilities from logits [B, L + 1, V], of which the last position predicts nothing."""
    impl = choose_impl(impl, logits)
    if completion_ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise ValueError(f"logits {tuple(logits.shape)} must be [B, L + 1, V] for ids {tuple(completion_ids.shape)}")
    check_temperature(temperature)
    token_ids = completion_ids if completion_mask is None else completion_ids.where(completion_mask.bool(), -1)
    token_ids = F.pad(token_ids, (0, 1), value=-1)
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return _RowLogProb.apply(logits, token_ids, temperature, inplace, impl)[:, :-1]


def fused_selective_log_softmax(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float = 0.9,
    mask: torch.Tensor | None = None,
    *,
    inplace: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Log-probabilities of the last L input ids under logits / temperature, fp32 [B, L], 0 where `mask` is 0.

    The contract of Liger-Kernel's function of the same name, with a gradient: logits [B, L + 1, V] as returned by
    `model(..., logits_to_keep=L + 1)`, input_ids and mask [B, >= L] of which the last L columns count.
    `inplace=True` lets the backward overwrite the logits with their gradient.
    Raises ValueError where the shapes disagree, the temperature is not positive or `impl` is unknown.
    """
    length = logits.shape[1] - 1
    completion_ids = input_ids[:, -length:] if length else input_ids[:, :0]
    mask = None if mask is None else mask[:, mask.shape[1] - length :]
    return completion_logps(logits, completion_ids, mask, temperature, inplace, impl)

"""Log-probabilities for trainers that hold the logits already.

Forward reads the logits once; backward reads them once and writes their gradient once, over the logits if asked to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tempsamp_kernels import reference, rows
from tempsamp_kernels.inputs import check_positive, check_token_ids
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.tokens import SKIP, HeadOptions, RowStatistics, Tokens

ROWS_PER_CHUNK = 256
PLAIN = HeadOptions()


def _chunks(logits: Tensor, tokens: Tokens) -> Iterator[tuple[slice, Tensor, Tokens]]:
    """At most ROWS_PER_CHUNK rows of one batch entry at a time, for logits [B, T, V] of any strides."""
    length = logits.shape[1]
    for entry, of_entry in enumerate(logits):
        for start in range(0, length, ROWS_PER_CHUNK):
            z = of_entry[start : start + ROWS_PER_CHUNK]
            chunk = slice(entry * length + start, entry * length + start + len(z))
            yield chunk, z, tokens[chunk]


def _statistics(logits: Tensor, tokens: Tokens, impl: str) -> RowStatistics:
    if impl == "triton":
        return rows.row_statistics(logits, tokens, PLAIN)
    table = torch.empty(3, len(tokens.token_ids), device=logits.device)
    for chunk, z, inputs in _chunks(logits, tokens):
        scaled = reference.scale_logits_(z.to(torch.float32, copy=True), inputs, PLAIN)
        table[:, chunk] = reference.softmax_statistics(scaled, inputs.token_ids, with_entropy=False).table()
    return RowStatistics(*table)


def _write_gradient(logits: Tensor, gradient: Tensor, tokens: Tokens, found: RowStatistics, d_logp: Tensor) -> None:
    for (chunk, z, inputs), (_, target, _) in zip(_chunks(logits, tokens), _chunks(gradient, tokens), strict=True):
        z = z.to(torch.float32, copy=True)
        reference.row_gradient(z, inputs, PLAIN, found[chunk], d_logp[chunk], None, z)
        target.copy_(z.masked_fill_((d_logp[chunk] == 0)[:, None], 0))


class _RowLogProb(torch.autograd.Function):
    """log p(token) of every row of logits [B, T, V], flat fp32 [B * T]; 0 for rows to skip."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tokens, inplace: bool, impl: str) -> Tensor:
        found = _statistics(logits, tokens, impl)
        ctx.save_for_backward(logits, found.logp, found.entropy, found.lse)
        ctx.tokens, ctx.inplace, ctx.impl = tokens, inplace, impl
        return found.logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor) -> tuple[Tensor | None, ...]:
        logits, *statistics = ctx.saved_tensors
        found = RowStatistics(*statistics)
        d_logp = d_logp.masked_fill(ctx.tokens.token_ids == SKIP, 0)
        gradient = logits.detach() if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        if ctx.impl == "triton":
            rows.row_gradient(logits, ctx.tokens, PLAIN, found, d_logp, None, gradient)
        else:
            _write_gradient(logits, gradient, ctx.tokens, found, d_logp)
        if ctx.inplace:
            # Whoever still needs the logits, this function included, gets autograd's error instead of their gradient.
            torch.autograd.graph.increment_version(logits)
        return gradient, None, None, None


def _rows_share_memory(logits: Tensor) -> bool:
    """Whether two rows of [B, T, V] may have an element in common, as those of an expanded tensor do."""
    reach = logits.shape[2]
    for stride, size in sorted(zip(logits.stride()[:2], logits.shape[:2], strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += (size - 1) * stride
    return False


def logits_logprob(
    logits: Tensor, token_ids: Tensor, temperature: float = 1.0, mask: Tensor | None = None, *, inplace: bool = False,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Log-prob of each token under its own row of logits / temperature, fp32 [...], 0 where `mask` [...] is 0.

    Args:
        logits: [..., V], any float dtype and strides; rows of masked tokens may hold anything.
        token_ids: [...] int64.
        inplace: let the backward overwrite the logits with their gradient (then it can run only once); not done under
            torch.compile, nor where rows share memory.

    Raises ValueError where the shapes disagree, the temperature is not positive, an unmasked id lies outside the
    vocabulary (on a GPU it gives NaN), or `impl` is unknown.
    """
    impl = choose_impl(impl, logits)
    check_positive(temperature=temperature)
    for name, value in {"token_ids": token_ids, "mask": mask}.items():
        if value is not None and value.shape != logits.shape[:-1]:
            raise ValueError(f"{name} must be {tuple(logits.shape[:-1])} for these logits; got {tuple(value.shape)}")
    if not logits.dtype.is_floating_point or token_ids.dtype != torch.int64:
        raise ValueError(f"logits must be floats and ids torch.int64; got {logits.dtype}, {token_ids.dtype}")
    mask = None if mask is None else mask.bool()
    check_token_ids(token_ids, mask, logits.shape[-1])
    flat_ids = (token_ids if mask is None else token_ids.masked_fill(~mask, SKIP)).reshape(-1)
    batch = logits if logits.ndim == 3 else logits.reshape(1, -1, logits.shape[-1])
    if batch.stride(-1) != 1:
        batch = batch.contiguous()
    inplace = inplace and not torch.compiler.is_compiling() and not _rows_share_memory(batch)
    tokens = Tokens.of_ids(flat_ids, torch.full(flat_ids.shape, float(temperature), device=logits.device))
    return _RowLogProb.apply(batch, tokens, inplace, impl).view(token_ids.shape)


def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None, *, inplace: bool = False,
    impl: str | None = None,
) -> Tensor:  # fmt: skip
    """Log-probabilities of the last L input ids under logits / temperature, fp32 [B, L], 0 where `mask` is 0.

    The contract of Liger-Kernel's function of the same name, with a gradient: logits [B, L + 1, V] as returned by
    `model(..., logits_to_keep=L + 1)`, of which the last position predicts nothing, input_ids and mask [B, >= L] of
    which the last L columns count. The rest is as in `logits_logprob`.
    """
    length = logits.shape[1] - 1
    last = lambda values: functional.pad(values[:, values.shape[1] - length :], (0, 1))
    counts = last(torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool())
    return logits_logprob(logits, last(input_ids), temperature, counts, inplace=inplace, impl=impl)[:, :-1]

"""Log-probabilities of given tokens straight from hidden states, without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels import reference
from tempsamp_kernels import rows as triton_rows
from tempsamp_kernels.head import ChunkedHead, HeadGradients, check_head, check_token_ids
from tempsamp_kernels.tiles import tile_statistics, tiles_beat_gemm
from tempsamp_kernels.tokens import HeadOptions, RowStatistics, Tokens, check_temperature, choose_impl, per_token

Gather = Callable[[Tensor, Tensor | None], AbstractContextManager[object]]
KERNELS = {"torch": reference, "triton": triton_rows}
"""What each chunk's logits are given to, by `impl`."""


def forward_sweep(head: ChunkedHead, tokens: Tokens, options: HeadOptions) -> RowStatistics:
    """Softmax statistics of all tokens: one GEMM, 2NHV FLOPs."""
    kernels = KERNELS[options.impl]
    tokens = tokens.padded(head.num_padded)
    found = []

    def consume(logits: Tensor, chunk: slice) -> None:
        found.append(kernels.row_statistics(logits, tokens.map(lambda field: field[chunk]), options))

    head.sweep(consume)
    if not found:
        return RowStatistics(*(tokens.temperature.new_empty(0) for _ in range(3)))
    joined = (torch.cat(column)[: head.num_tokens] for column in zip(*map(astuple, found), strict=True))
    return RowStatistics(*joined)


def gradient_sweep(
    head: ChunkedHead,
    tokens: Tokens,
    options: HeadOptions,
    rows: RowStatistics,
    d_logp: Tensor,
    d_entropy: Tensor | None,
    gradients: HeadGradients,
) -> None:
    """Recompute the logits and push d loss / d logp and / d entropy [N] through them: three GEMMs, 6NHV FLOPs."""
    kernels = KERNELS[options.impl]
    tokens = tokens.padded(head.num_padded)
    rows, d_logp = rows.map(head.padded), head.padded(d_logp)
    d_entropy = None if d_entropy is None else head.padded(d_entropy)

    def consume(logits: Tensor, chunk: slice) -> Tensor:
        cut = lambda values: values[chunk]
        d_entropy_chunk = None if d_entropy is None else d_entropy[chunk]
        return kernels.row_gradient(
            logits, tokens.map(cut), options, rows.map(cut), d_logp[chunk], d_entropy_chunk, head.gemm_dtype
        )

    head.sweep(consume, gradients)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        options: HeadOptions,
        chunk_size: int | None,
        gather: Gather | None,
        wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        head = ChunkedHead(hidden, weight, None, chunk_size)
        may_use_tiles = options.impl == "triton" and not wants_grad and chunk_size is None
        if may_use_tiles and tiles_beat_gemm(hidden.shape[1], head.gemm_dtype):
            found = tile_statistics(hidden.to(head.gemm_dtype), head.weight, tokens, options)
        else:
            found = forward_sweep(head, tokens, options)
        ctx.save_for_backward(hidden, weight, bias, found.logp, found.entropy, found.lse)
        ctx.tokens, ctx.options, ctx.chunk_size, ctx.compute_dtype = tokens, options, chunk_size, head.compute_dtype
        ctx.gather = gather
        ctx.set_materialize_grads(False)
        return found.logp, found.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *statistics = ctx.saved_tensors
        rows = RowStatistics(*statistics)
        if d_logp is None:
            d_logp = torch.zeros_like(rows.logp)
        with nullcontext() if ctx.gather is None else ctx.gather(weight, bias):
            head = ChunkedHead(hidden, weight, None, ctx.chunk_size, ctx.compute_dtype)
            gradients = head.gradients(*ctx.needs_input_grad[:3])
            gradient_sweep(head, ctx.tokens, ctx.options, rows, d_logp, d_entropy, gradients)
        wanted = zip((gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True)
        return (*(None if grad is None else grad.to(like.dtype) for grad, like in wanted), *[None] * 5)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    gather: Gather | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of `token_ids` and entropy under `softmax(head(hidden) / temperature)`, differentiable in both.

    Args:
        hidden: [..., H], float32, bfloat16 or float16.
        weight: [V, H], any floating dtype; under autocast both are cast to its dtype.
        token_ids: [...] int64; one outside the vocabulary raises on a CPU and gives NaN on a GPU.
        bias: [V].
        temperature: a positive number, or one per token [...].
        softcap: `z -> softcap * tanh(z / softcap)`, applied after `logit_scale` and before the temperature.
        logit_scale: factor of the raw logits.
        chunk_size: tokens per chunk of logits; by default equal chunks within a memory budget, or no logits at all
            where no gradient is wanted and the shape favours it (`tiles_beat_gemm`). A fixed size makes log-probs
            comparable to the bit between calls.
        gather: makes the context in which a sharded weight and bias are whole (ZeRO-3). The caller holds one around
            this call; the backward enters another.
        impl: "triton", "torch", or None for the one that suits the device.

    Returns:
        `(logp, entropy)`, both [...] float32.

    Costs 2NHV FLOPs forward and 6NHV backward (4NHV with a frozen weight); keeps [N] statistics only.
    The contract is TRL's and verl's fused log-prob. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    check_head(hidden, weight, token_ids, bias)
    check_token_ids(token_ids, len(weight))
    check_temperature(temperature)
    impl = choose_impl(impl, hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    num_tokens = len(flat)
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(token_ids.shape).reshape(-1)
    zeros = torch.zeros(num_tokens, device=hidden.device)
    tokens = Tokens(
        token_ids=token_ids.reshape(-1),
        temperature=per_token(temperature, None, num_tokens, "temperature", hidden.device),
        advantage=zeros,
        policy_weight=zeros,
        kl_weight=zeros,
        old_logps=zeros,
        ref_logps=zeros,
    )
    options = HeadOptions(bias, softcap, logit_scale, impl)
    logp, entropy = _LinearLogprob.apply(
        flat, weight, bias, tokens, options, chunk_size, gather, torch.is_grad_enabled()
    )
    return logp.view(token_ids.shape), entropy.view(token_ids.shape)

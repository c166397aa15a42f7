"""Log-probabilities of given tokens straight from hidden states, without keeping the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempsamp_kernels import reference
from tempsamp_kernels import rows as triton_rows
from tempsamp_kernels.head import ChunkedHead, HeadGradients, finish, gradient_scale
from tempsamp_kernels.inputs import check_head, check_positive, check_token_ids
from tempsamp_kernels.launch import choose_impl
from tempsamp_kernels.tokens import HeadOptions, RowStatistics, Tokens

Gather = Callable[[Tensor, Tensor | None], AbstractContextManager[object]]
KERNELS = {"torch": reference, "triton": triton_rows}
"""What each chunk's logits are given to, by `impl`."""


def forward_sweep(head: ChunkedHead, tokens: Tokens, options: HeadOptions) -> tuple[RowStatistics, Tensor | None]:
    """Softmax statistics of all tokens by one GEMM, 2NHV FLOPs, and the raw logits of the last chunk.

    The latter only where the kernels leave them as they are.
    """
    kernels = KERNELS[options.impl]
    tokens = tokens.padded(head.num_padded)
    table = tokens.temperature.new_empty(3, head.num_padded)

    def consume(logits: Tensor, chunk: slice, _: Tensor) -> None:
        table[:, chunk] = kernels.row_statistics(logits, tokens[chunk], options).table()

    logits = head.sweep(consume)
    return RowStatistics(*table[:, : head.num_tokens]), logits if options.impl == "triton" else None


def gradient_sweep(
    head: ChunkedHead, tokens: Tokens, options: HeadOptions, rows: RowStatistics, d_logp: Tensor,
    d_entropy: Tensor | None, gradients: HeadGradients, kept: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Push d loss / d logp and / d entropy [N] through the logits: 6NHV FLOPs, less 2HV for each row of `kept` ones.

    Returns the scale [1] that the gradients have been multiplied by, if any.
    """
    scale = gradient_scale(d_logp if d_entropy is None else d_logp.abs() + d_entropy.abs(), head.gemm_dtype)
    if scale is not None:
        d_logp, d_entropy = d_logp * scale, None if d_entropy is None else d_entropy * scale
    kernels = KERNELS[options.impl]
    tokens = tokens.padded(head.num_padded)
    rows, d_logp = rows.map(head.padded), head.padded(d_logp)
    d_entropy = None if d_entropy is None else head.padded(d_entropy)

    def consume(logits: Tensor, chunk: slice, out: Tensor) -> None:
        d_entropy_chunk = None if d_entropy is None else d_entropy[chunk]
        kernels.row_gradient(logits, tokens[chunk], options, rows[chunk], d_logp[chunk], d_entropy_chunk, out)

    head.sweep(consume, gradients, kept)
    return scale


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tokens, options: HeadOptions,
        chunk_size: int | None, gather: Gather | None, wants_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        head = ChunkedHead(hidden, weight, None, chunk_size)
        found, logits = forward_sweep(head, tokens, options)
        ctx.save_for_backward(hidden, weight, bias, found.logp, found.entropy, found.lse)
        ctx.tokens, ctx.options, ctx.chunk_size, ctx.compute_dtype = tokens, options, chunk_size, head.compute_dtype
        ctx.gather = gather
        ctx.logits = logits if wants_grad else None
        ctx.set_materialize_grads(False)
        return found.logp, found.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *statistics = ctx.saved_tensors
        rows = RowStatistics(*statistics)
        d_logp = torch.zeros_like(rows.logp) if d_logp is None else d_logp
        with nullcontext() if ctx.gather is None else ctx.gather(weight, bias):
            head = ChunkedHead(hidden, weight, None, ctx.chunk_size, ctx.compute_dtype)
            gradients = HeadGradients(head, *ctx.needs_input_grad[:3])
            # A gradient in fp32 takes the memory of the logits: a second backward makes them again.
            kept, ctx.logits = ctx.logits, None
            scale = gradient_sweep(head, ctx.tokens, ctx.options, rows, d_logp, d_entropy, gradients, kept)
        dtypes = [None if like is None else like.dtype for like in (hidden, weight, bias)]
        found = finish(gradients.state(head), dtypes, None if scale is None else 1 / scale[0])
        return (*found, *[None] * 5)


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
        temperature: a positive number, or one per token, in any shape that expands to [...].
        softcap: `z -> softcap * tanh(z / softcap)`, applied after `logit_scale` and before the temperature.
        logit_scale: factor of the raw logits.
        chunk_size: tokens per chunk of logits; by default equal chunks within a memory budget. A fixed size makes
            log-probs comparable to the bit between calls.
        gather: makes the context in which a sharded weight and bias are whole (ZeRO-3). The caller holds one around
            this call; the backward enters another.
        impl: "triton", "torch", or None for the one that suits the device.

    Returns:
        `(logp, entropy)`, both [...] float32.

    Costs 2NHV FLOPs forward and 6NHV backward (4NHV with a frozen weight). The Triton kernels keep the logits of the
    last chunk until the backward, which spares it 2HV per row: all of a batch that fits one chunk costs 6NHV.
    The contract is TRL's and verl's fused log-prob. Raises ValueError for shapes, dtypes or names that do not fit.
    """
    check_head(hidden, weight, token_ids, bias, chunk_size)
    check_token_ids(token_ids, None, len(weight))
    check_positive(temperature=temperature, softcap=softcap)
    impl = choose_impl(impl, hidden)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if not isinstance(temperature, Tensor):
        temperature = torch.full((), float(temperature), device=hidden.device)
    try:
        spread = temperature.detach().expand(token_ids.shape).to(hidden.device, torch.float32, non_blocking=True)
    except RuntimeError:
        shapes = f"{tuple(token_ids.shape)} like token_ids; got {tuple(temperature.shape)}"
        raise ValueError(f"temperature must be a number or expand to {shapes}") from None
    tokens = Tokens.of_ids(token_ids.reshape(-1), spread.reshape(-1).contiguous())
    options = HeadOptions(bias, softcap, logit_scale, impl)
    logp, entropy = _LinearLogprob.apply(
        flat, weight, bias, tokens, options, chunk_size, gather, torch.is_grad_enabled()
    )
    return logp.view(token_ids.shape), entropy.view(token_ids.shape)

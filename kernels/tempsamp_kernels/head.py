"""The GEMMs of a language-model head, a chunk of tokens at a time: logits, their consumer, dX and dW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import copy

import torch
from torch import Tensor
from torch.nn import functional

from tempsamp_kernels.tokens import aligned

ROW_MULTIPLE = 32
LOGITS_BYTES = {"cuda": 5 << 28, "cpu": 1 << 28}
"""Size of a chunk's fp32 logits: 1.25 GiB holds 2,048 rows of a 152k vocabulary, enough to amortise the dW traffic."""


def chunk_rows(num_tokens: int, vocab_size: int, device_type: str) -> int:
    """Rows of each chunk: as few equal chunks as the memory budget allows, so that padding stays under one multiple."""
    budget = LOGITS_BYTES.get(device_type, LOGITS_BYTES["cpu"])
    most = max(ROW_MULTIPLE, budget // (4 * vocab_size) // ROW_MULTIPLE * ROW_MULTIPLE)
    num_chunks = max(1, -(-num_tokens // most))
    rows = -(-max(1, num_tokens) // num_chunks)
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE


def multiplies_into_fp32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies operands of this dtype into fp32 without rounding the product: tensor cores."""
    return device_type != "cpu" and dtype in (torch.bfloat16, torch.float16)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def mm(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated in fp32 and rounded once, to `dtype`."""
    if a.dtype == dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out).to(dtype)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class HeadGradients:
    """What a loss asks for of d loss / d hidden [N, H], weight [V, H] and bias [V], added up over chunks in fp32.

    With a single chunk of bf16 operands dW waits for `finish`: there it is multiplied once and written as it is asked
    for, without a copy in fp32. The gradient of the logits keeps their memory until then.
    """

    def __init__(self, head: ChunkedHead, hidden: bool, weight: bool, bias: bool) -> None:
        zeros = lambda wanted, *size: torch.zeros(size, device=head.weight.device) if wanted else None
        self.wants_weight = weight
        self.hidden, self.bias = zeros(hidden, *head.hidden.shape), zeros(bias, len(head.weight))
        self.weight: Tensor | None = None
        self.factors: tuple[Tensor | None, Tensor | None] = None, None

    def any(self) -> bool:
        return self.wants_weight or self.hidden is not None or self.bias is not None

    def add(self, head: ChunkedHead, chunk: slice, x: Tensor, d_logits: Tensor) -> None:
        """One chunk's part, from its hidden states [rows, H] and d loss / d logits [rows, V] in the GEMM's dtype."""
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=torch.float32)
        if self.hidden is not None:
            target = self.hidden[chunk.start : min(chunk.stop, head.num_tokens)]
            if len(target) == head.rows:
                mm(d_logits, head.weight, out=target)
            else:
                target.copy_(mm(d_logits, head.weight)[: len(target)])
        if not self.wants_weight:
            return
        if head.num_padded == head.rows and head.gemm_dtype == torch.bfloat16:
            self.factors = d_logits, x
        elif self.weight is None:
            self.weight = mm(d_logits.t(), x)
        else:
            addmm_(self.weight, d_logits.t(), x)

    def state(self, head: ChunkedHead) -> tuple[Tensor | None, ...]:
        """What `finish` needs, to be saved until a backward pass."""
        if self.wants_weight and self.weight is None and self.factors[0] is None:
            self.weight = torch.zeros(head.weight.shape, device=head.weight.device)
        return (self.hidden, self.weight, self.bias, *self.factors)


def finish(
    state: tuple[Tensor | None, ...], dtypes: list[torch.dtype | None], factor: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a `HeadGradients.state` times `factor`, each rounded once, to its dtype."""

    def scaled(gradient: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        if gradient is None or factor is None:
            return None if gradient is None else gradient.to(dtype)
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

    hidden, weight, bias, d_logits, x = state
    d_hidden, d_weight, d_bias = map(scaled, (hidden, weight, bias), dtypes)
    if d_logits is not None and x is not None and dtypes[1] is not None:
        d_weight = mm(d_logits.t(), x if factor is None else x * factor, dtypes[1])
    return d_hidden, d_weight, d_bias


def gradient_scale(d_logp: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of two, [1], that brings gradients of about `d_logp` [N] into the range of float16; None for others."""
    if dtype != torch.float16:
        return None
    room = 64 / functional.pad(d_logp.abs(), (0, 1)).amax(0, keepdim=True)
    return torch.where(room.isfinite(), room.log2().floor().exp2(), 1.0)


class ChunkedHead:
    """`hidden [N, H] @ weight [V, H].T` in chunks of equal row count.

    Operands keep the compute dtype (autocast's, or that of `hidden`) where the device multiplies it into fp32 without
    rounding the product; everything else is multiplied in fp32. All chunks have the same shape, which makes a token's
    log-prob and dX the same bits at any position; with a `chunk_size`, among any number of tokens.
    Rows where `mask` [N] is False count as zeros, whatever they hold.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor | None,
        chunk_size: int | None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        device_type = hidden.device.type
        given = torch.get_autocast_dtype(device_type) if _autocasts(device_type) else hidden.dtype
        self.chunk_size, self.compute_dtype = chunk_size, compute_dtype or given
        on_tensor_cores = multiplies_into_fp32(device_type, self.compute_dtype)
        self.gemm_dtype = self.compute_dtype if on_tensor_cores else torch.float32
        self.weight = weight.detach().to(self.compute_dtype).to(self.gemm_dtype)
        self._take(hidden, mask)

    def _take(self, hidden: Tensor, mask: Tensor | None) -> None:
        self.hidden, self.mask, self.num_tokens = hidden, mask, len(hidden)
        self.rows = self.chunk_size or chunk_rows(self.num_tokens, len(self.weight), hidden.device.type)
        self.num_padded = -(-self.num_tokens // self.rows) * self.rows

    def part(self, tokens: slice) -> ChunkedHead:
        """The same head over some of the tokens."""
        part = copy(self)
        part._take(self.hidden[tokens], None if self.mask is None else self.mask[tokens])
        return part

    def padded(self, values: Tensor) -> Tensor:
        """[N] values extended with zeros to whole chunks."""
        return functional.pad(values, (0, self.num_padded - self.num_tokens))

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, self.rows):
            yield slice(start, start + self.rows)

    def inputs(self, chunk: slice) -> Tensor:
        """The chunk's hidden states [rows, H], masked, padded and in the GEMM's dtype."""
        x = self.hidden[chunk]
        if self.mask is not None:
            x = x.masked_fill(~self.mask[chunk, None], 0)
        return functional.pad(x.to(self.compute_dtype).to(self.gemm_dtype), (0, 0, 0, self.rows - len(x)))

    def buffer(self) -> Tensor:
        """Memory for one chunk's logits [rows, V] fp32, its rows `aligned` for any vocabulary."""
        vocab_size = len(self.weight)
        return torch.empty(self.rows, aligned(vocab_size), device=self.weight.device)[:, :vocab_size]

    def sweep(
        self,
        consume: Callable[[Tensor, slice], Tensor | None],
        gradients: HeadGradients | None = None,
        kept: Tensor | None = None,
    ) -> Tensor | None:
        """Give each chunk's raw logits [rows, V] fp32 to `consume`, which may overwrite them.

        With `gradients`, it returns d loss / d logits in the GEMM's dtype, to be multiplied into them. `kept` are the
        raw logits of the last chunk, as an earlier sweep returned them, for this one not to compute them again.
        """
        buffer, device_type = None, self.hidden.device.type
        with torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext():
            for chunk in self.chunks():
                x = self.inputs(chunk)
                if kept is not None and chunk.stop == self.num_padded:
                    logits = kept
                else:
                    buffer = self.buffer() if buffer is None else buffer
                    logits = mm(x, self.weight.t(), out=buffer)
                d_logits = consume(logits, chunk)
                if gradients is not None and d_logits is not None:
                    gradients.add(self, chunk, x, d_logits)
        return buffer

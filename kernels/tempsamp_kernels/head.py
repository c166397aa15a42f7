"""The GEMMs of a language-model head, a chunk of tokens at a time: logits, their consumer, dX and dW."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

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


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device_type = hidden.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in fp32, whatever the operands' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@dataclass
class HeadGradients:
    """fp32 accumulators; None where nothing asks for that gradient."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def any(self) -> bool:
        return self.hidden is not None or self.weight is not None or self.bias is not None


class ChunkedHead:
    """`hidden [N, H] @ weight [V, H].T` in chunks of equal row count.

    Operands keep the compute dtype (autocast's, or that of `hidden`) where the device multiplies it into fp32 without
    rounding the product: bf16 on CUDA. Everything else is multiplied in fp32. All chunks have the same shape, which
    makes a token's log-prob and dX the same bits at any position; with a `chunk_size`, among any number of tokens.
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
        self.chunk_size, self.compute_dtype = chunk_size, compute_dtype or _compute_dtype(hidden)
        multiplies_into_fp32 = hidden.device.type != "cpu" and self.compute_dtype == torch.bfloat16
        self.gemm_dtype = torch.bfloat16 if multiplies_into_fp32 else torch.float32
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

    def gradients(self, hidden: bool, weight: bool, bias: bool) -> HeadGradients:
        vocab_size, hidden_size = self.weight.shape

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(shape, dtype=torch.float32, device=self.weight.device) if wanted else None

        return HeadGradients(
            zeros(hidden, *self.hidden.shape), zeros(weight, vocab_size, hidden_size), zeros(bias, vocab_size)
        )

    def sweep(self, consume: Callable[[Tensor, slice], Tensor | None], gradients: HeadGradients | None = None) -> None:
        """Give each chunk's raw logits [rows, V] fp32 to `consume`, which may overwrite them.

        With `gradients`, it returns d loss / d logits in the GEMM's dtype, to be multiplied into them.
        """
        if self.num_tokens == 0:
            return
        with _without_autocast(self.hidden.device.type):
            buffer = torch.empty(self.rows, len(self.weight), dtype=torch.float32, device=self.weight.device)
            for chunk in self.chunks():
                x = self.inputs(chunk)
                d_logits = consume(_mm(x, self.weight.t(), out=buffer), chunk)
                if gradients is None or d_logits is None:
                    continue
                if gradients.bias is not None:
                    gradients.bias += d_logits.sum(0, dtype=torch.float32)
                if gradients.hidden is not None:
                    target = gradients.hidden[chunk]
                    target.copy_(_mm(d_logits, self.weight)[: len(target)])
                if gradients.weight is not None:
                    _addmm_(gradients.weight, d_logits.t(), x)


def check_head(hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where shapes or dtypes do not make a head."""
    if not hidden.dtype.is_floating_point or hidden.dtype == torch.float64:
        raise ValueError(f"hidden must be float32, bfloat16 or float16; got {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]}; got {tuple(weight.shape)} "
            "(gather a sharded head, and pass the inner weight of a wrapped one)"
        )
    if type(weight.data) is not Tensor:
        raise ValueError(f"weight must be a plain tensor; got {type(weight.data).__name__}: pass its full tensor")
    if token_ids.shape != hidden.shape[:-1]:
        raise ValueError(f"token_ids must be {tuple(hidden.shape[:-1])} like hidden; got {tuple(token_ids.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}; got {tuple(bias.shape)}")


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary, where it can be seen without waiting for a device."""
    if token_ids.device.type != "cpu" or not token_ids.numel():
        return
    least, largest = (int(extreme) for extreme in token_ids.aminmax())
    if least < 0 or largest >= vocab_size:
        raise ValueError(f"token_ids must be in [0, {vocab_size}); got {least if least < 0 else largest}")

"""The GEMMs of a language-model head, a chunk of tokens at a time: logits, their consumer, dX and dW."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from tempsamp_kernels.tokens import aligned

ROW_MULTIPLE, TILE_ROWS = 32, 128
LOGITS_BYTES = {"cuda": 5 << 27, "cpu": 1 << 28}
"""Size of a chunk's fp32 logits, of which a GPU holds two: .625 GiB are 1,024 rows of a 152k vocabulary."""
GRADIENT_BYTES = 5 << 30
"""Size of the half-precision gradients of logits that wait for their GEMMs: 5 GiB are 17,600 rows of 152k."""


def num_panels(num_tokens: int, vocab_size: int) -> int:
    """Equal runs of chunks whose gradients wait together."""
    return max(1, -(-num_tokens // max(ROW_MULTIPLE, GRADIENT_BYTES // (2 * vocab_size))))


def chunk_rows(num_tokens: int, vocab_size: int, device_type: str) -> int:
    """Rows of equal chunks: as few as fit the budget, on a GPU the number up to twice as many that pads least.

    Of several chunks on a GPU each is a whole number of tiles, for the GEMM that makes its logits.
    """
    budget, is_gpu = LOGITS_BYTES.get(device_type, LOGITS_BYTES["cpu"]), device_type not in ("cpu", "meta")
    tokens = max(1, -(-num_tokens // (num_panels(num_tokens, vocab_size) if is_gpu else 1)))
    fitting = budget // (4 * vocab_size)
    multiple = TILE_ROWS if is_gpu and tokens > fitting >= TILE_ROWS else ROW_MULTIPLE
    fewest = -(-tokens // max(multiple, fitting // multiple * multiple))
    numbers = range(fewest, (2 * fewest if is_gpu else fewest) + 1)
    sizes = [-(-tokens // (number * multiple)) * multiple for number in numbers]
    return min(sizes, key=lambda rows: -(-tokens // rows) * rows)


def multiplies_into_fp32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies operands of this dtype into fp32 without rounding the product: tensor cores."""
    return device_type != "cpu" and dtype in (torch.bfloat16, torch.float16)


def _autocasts(device_type: str) -> bool:
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


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

    Where one panel of bf16 operands holds all tokens, dW waits for `finish`: there it is multiplied once and written as
    it is asked for, without a copy in fp32. The gradient of the logits keeps its memory until then.
    """

    def __init__(self, head: ChunkedHead, hidden: bool, weight: bool, bias: bool) -> None:
        zeros = lambda wanted, *size: torch.zeros(size, device=head.weight.device) if wanted else None
        self.wants_weight = weight
        self.hidden, self.bias = zeros(hidden, *head.hidden.shape), zeros(bias, len(head.weight))
        self.weight: Tensor | None = None
        self.factors: tuple[Tensor | None, Tensor | None] = None, None

    def any(self) -> bool:
        return self.wants_weight or self.hidden is not None or self.bias is not None

    def add(self, head: ChunkedHead, panel: slice, x: Tensor, d_logits: Tensor) -> None:
        """One panel's part, from its hidden states [rows, H] and d loss / d logits [rows, V] in the GEMM's dtype."""
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=torch.float32)
        if self.hidden is not None:
            target = self.hidden[panel]
            if len(target) == len(d_logits):
                mm(d_logits, head.weight, out=target)
            else:
                target.copy_(mm(d_logits, head.weight)[: len(target)])
        if not self.wants_weight:
            return
        if len(d_logits) >= head.num_tokens and head.gemm_dtype == torch.bfloat16:
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


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all sweeps on a device, first in line where a multiprocessor falls free."""
    return torch.cuda.Stream(device, priority=-1)


class Turns:
    """Buffers that the current stream fills in turn, and what reads them: on a second stream, beside the next filling.

    Without a second stream one buffer is enough, and everything runs in its place.
    """

    def __init__(self, make: Callable[[], Tensor], second: torch.cuda.Stream | None) -> None:
        self.make, self.second = make, second
        self.buffers: list[Tensor] = []
        self.ends: list[torch.cuda.Event] = []

    def buffer(self) -> Tensor:
        """One to fill, which nobody reads any more."""
        if len(self.buffers) <= (self.second is not None):
            self.buffers.append(self.make())
        else:
            self.buffers.append(self.buffers.pop(0))
            if self.second is not None:
                torch.cuda.current_stream(self.second.device).wait_event(self.ends.pop(0))
        return self.buffers[-1]

    def read(self, function: Callable[..., None], *arguments: object) -> None:
        """Run what reads the buffer filled last, after everything that has been started so far."""
        if self.second is None:
            return function(*arguments)
        self.second.wait_stream(torch.cuda.current_stream(self.second.device))
        with torch.cuda.stream(self.second):
            function(*arguments)
        self.ends.append(self.second.record_event())

    def join(self) -> None:
        """What comes next on the current stream comes after all of it."""
        if self.second is not None:
            torch.cuda.current_stream(self.second.device).wait_stream(self.second)

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        self.join()


class ChunkedHead:
    """`hidden [N, H] @ weight [V, H].T` in chunks of equal row count.

    Operands keep the compute dtype (autocast's, or that of `hidden`) where the device multiplies it into fp32 without
    rounding the product; everything else is multiplied in fp32. All chunks have the same shape, which makes a token's
    log-prob the same bits at any position; with a `chunk_size`, among any number of tokens. In half precision the
    gradients of many chunks' logits, a panel, are multiplied at once: all panels have the same shape too, so dX is the
    same bits at any position. Rows where `mask` [N] is False count as zeros, whatever they hold.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, mask: Tensor | None, chunk_size: int | None,
        compute_dtype: torch.dtype | None = None, is_cast: bool = False,
    ) -> None:  # fmt: skip
        """is_cast: the weight has the GEMM's dtype already."""
        device_type = hidden.device.type
        given = torch.get_autocast_dtype(device_type) if _autocasts(device_type) else hidden.dtype
        self.chunk_size, self.compute_dtype = chunk_size, compute_dtype or given
        on_tensor_cores = multiplies_into_fp32(device_type, self.compute_dtype)
        self.gemm_dtype = self.compute_dtype if on_tensor_cores else torch.float32
        self.weight = weight if is_cast else weight.detach().to(self.compute_dtype).to(self.gemm_dtype)
        self.hidden, self.mask, self.num_tokens = hidden, mask, len(hidden)
        self.rows = self.panel_rows = self.chunk_size or chunk_rows(len(hidden), len(self.weight), hidden.device.type)
        if self.gemm_dtype != torch.float32:
            per_panel = -(-len(hidden) // num_panels(len(hidden), len(self.weight)))
            self.panel_rows = max(1, -(-per_panel // self.rows)) * self.rows
        self.num_padded = -(-len(hidden) // self.panel_rows) * self.panel_rows

    def part(self, tokens: slice) -> ChunkedHead:
        """The same head over some of the tokens."""
        mask = None if self.mask is None else self.mask[tokens]
        return ChunkedHead(self.hidden[tokens], self.weight, mask, self.chunk_size, self.compute_dtype, is_cast=True)

    def padded(self, values: Tensor) -> Tensor:
        """[N] values extended with zeros to whole chunks."""
        return functional.pad(values, (0, self.num_padded - self.num_tokens))

    def inputs(self, panel: slice) -> Tensor:
        """The panel's hidden states [rows, H], masked, padded and in the GEMM's dtype."""
        x = self.hidden[panel]
        if self.mask is not None:
            x = x.masked_fill(~self.mask[panel, None], 0)
        return functional.pad(x.to(self.compute_dtype).to(self.gemm_dtype), (0, 0, 0, self.panel_rows - len(x)))

    def buffer(self, num_rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for logits or their gradient [rows, V], its rows `aligned` but under torch.compile, which cannot."""
        vocab_size = len(self.weight)
        width = vocab_size if torch.compiler.is_compiling() else aligned(vocab_size)
        return torch.empty(num_rows, width, dtype=dtype, device=self.weight.device)[:, :vocab_size]

    def overlaps(self) -> bool:
        """Whether a second stream has work: where the next logits need not wait for the gradients of these."""
        several = self.rows < min(self.panel_rows, self.num_tokens)
        return several and self.hidden.is_cuda and not torch.compiler.is_compiling()

    def sweep(
        self, consume: Callable[[Tensor, slice, Tensor], None], gradients: HeadGradients | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Give each chunk's raw logits [rows, V] fp32 to `consume(logits, chunk, out)`, which may overwrite them.

        With `gradients`, it writes d loss / d logits to `out`, to be multiplied into them: the logits themselves where
        the GEMMs take fp32. On a GPU it runs beside the GEMM that makes the next chunk's logits. `kept` are the raw
        logits of the last chunk, as an earlier sweep returned them, for this one not to compute them again.
        """
        device_type, logits = self.hidden.device.type, self.buffer(0)
        no_autocast = torch.autocast(device_type, enabled=False) if _autocasts(device_type) else nullcontext()
        d_logits = None
        if gradients is not None and self.gemm_dtype != torch.float32:
            d_logits = self.buffer(self.panel_rows, self.gemm_dtype)
        second = second_stream(self.hidden.device) if self.overlaps() else None
        with no_autocast, Turns(lambda: self.buffer(self.rows), second) as turns:
            for first in range(0, self.num_tokens, self.panel_rows):
                panel = slice(first, first + self.panel_rows)
                x = self.inputs(panel)
                for start in range(first, min(panel.stop, self.num_tokens), self.rows):
                    chunk, part = slice(start, start + self.rows), slice(start - first, start - first + self.rows)
                    if kept is not None and chunk.stop >= self.num_tokens:
                        logits = kept
                    else:
                        logits = mm(x[part], self.weight.t(), out=turns.buffer())
                    turns.read(consume, logits, chunk, logits if d_logits is None else d_logits[part])
                if gradients is not None:
                    turns.join()
                    d_panel = logits if d_logits is None else d_logits
                    d_panel[part.stop :] = 0
                    gradients.add(self, panel, x, d_panel)
        return logits

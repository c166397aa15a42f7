"""The second stream of the sweeps: whatever two streams touch is ordered by events, and nothing changes by it.

Streams and events are doubles that keep vector clocks; every operation is booked on the stream it would run on, with
the memory it reads and writes. Two accesses of one memory, one of them a write, race where neither stream has waited.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob, rows
from tempsamp_kernels import head as heads
from tempsamp_kernels.head import ChunkedHead, Turns
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WRITTEN_BY_KERNELS = ("gradient_ptr", "statistics_ptr", "terms_ptr", "sums_ptr")


class Stream:
    """What it knows of each stream's progress: everything up to those operations comes before its next one."""

    device = None

    def __init__(self, name: str) -> None:
        self.name, self.knows = name, {name: 0}

    def record_event(self) -> dict[str, int]:
        return dict(self.knows)

    def _learn(self, clocks: dict[str, int]) -> None:
        self.knows = {name: max(self.knows.get(name, 0), clocks.get(name, 0)) for name in self.knows | clocks}

    def wait_event(self, event: dict[str, int]) -> None:
        self._learn(event)

    def wait_stream(self, other: Stream) -> None:
        self._learn(other.knows)


class Book(TorchDispatchMode):
    """Who touched which memory when, and the races among them."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.second = Stream("main"), Stream("second")
        self.current, self.alive, self.races = self.main, [], []
        self.log: dict[int, list[tuple[str, int, bool, str]]] = {}
        self.names: set[str] = set()

    def touch(self, operation: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        stream = self.current
        stream.knows[stream.name] += 1
        self.names.add(stream.name)
        self.alive += reads + writes  # so that no two of them ever have the same address
        for tensor, is_write in [(each, False) for each in reads] + [(each, True) for each in writes]:
            entries = self.log.setdefault(tensor.untyped_storage().data_ptr(), [])
            for other, clock, wrote, name in entries:
                if (wrote or is_write) and clock > stream.knows.get(other, 0):
                    self.races.append(f"{operation} on {stream.name} against {name} on {other}")
            entries.append((stream.name, stream.knows[stream.name], is_write, operation))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        reads, writes = [], [each for each in tree_leaves(kwargs) if torch.is_tensor(each)]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            tensors = [each for each in tree_leaves(value) if torch.is_tensor(each)]
            (writes if argument.is_write else reads).extend(tensors)
        if not func.is_view:
            self.touch(str(func), reads, writes + [each for each in tree_leaves(found) if torch.is_tensor(each)])
        return found

    @contextmanager
    def on(self, stream: Stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def book(monkeypatch) -> Book:
    """A CPU that multiplies bf16 into fp32, has two streams and books what runs on them."""
    book = Book()

    def mm(a, b, dtype=torch.float32, out=None):
        product = torch.mm(a.float(), b.float())
        return product.to(dtype) if out is None else out.copy_(product)

    def launch(kernel, grid, **arguments):
        with _disable_current_modes():
            original(kernel, grid, **arguments)
        tensors = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
        writes = [tensors.pop(name) for name in WRITTEN_BY_KERNELS if name in tensors]
        book.touch(kernel.__name__, list(tensors.values()), writes)

    original = rows.launch
    monkeypatch.setattr(rows, "launch", launch)
    monkeypatch.setattr(heads, "multiplies_into_fp32", lambda _, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(heads, "mm", mm)
    monkeypatch.setattr(heads, "addmm_", lambda total, a, b: total.add_(a.float() @ b.float()))
    monkeypatch.setattr(heads, "second_stream", lambda _: book.second)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: book.current)
    monkeypatch.setattr(torch.cuda, "stream", book.on)
    monkeypatch.setattr(ChunkedHead, "overlaps", lambda self: self.rows < min(self.panel_rows, self.num_tokens))
    return book


def leaves(batch):
    return [getattr(batch, name).bfloat16().requires_grad_() for name in ("hidden", "weight", "bias")]


def loss_step(batch, impl, **options):
    x, w, bias = leaves(batch)
    loss, metrics = fused_linear_grpo_loss(
        x, w, batch.token_ids, batch.row_ids, advantages=batch.advantages, old_logps=batch.old_logps,
        ref_logps=batch.ref_logps, mask=batch.mask, bias=bias, chunk_size=3, impl=impl, **options,
    )  # fmt: skip
    return [loss.detach(), metrics.token_logps, *torch.autograd.grad(loss, (x, w, bias))]


def logprob_step(batch, impl):
    x, w, bias = leaves(batch)
    found = linear_logprob(x, w, batch.token_ids, bias=bias, chunk_size=3, impl=impl)
    return [*(each.detach() for each in found), *torch.autograd.grad(found[0].sum() + found[1].sum(), (x, w, bias))]


STEPS = {
    "loss": loss_step,
    "entropy": lambda batch, impl: loss_step(batch, impl, entropy_coef=0.1),
    "sequence": lambda batch, impl: loss_step(batch, impl, importance_sampling_level="sequence"),
    "logprob": logprob_step,
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(
    ("step", "panel_rows"),
    [
        ("loss", 16),
        *((step, 9) for step in STEPS),
        *(pytest.param(step, 16, marks=pytest.mark.slow) for step in STEPS if step != "loss"),
    ],
)
def test_no_memory_is_touched_by_two_streams_out_of_order_and_no_bit_changes(
    packed, monkeypatch, book, step, panel_rows, impl
):
    """Six chunks of 3 rows: in one panel, and in two, of which the second has a chunk without tokens."""
    batch = packed([5, 8, 3])
    monkeypatch.setattr(heads, "GRADIENT_BYTES", 2 * 37 * panel_rows)
    monkeypatch.setattr(heads, "ROW_MULTIPLE", 1)
    with book:
        found = STEPS[step](batch, impl)
    assert not book.races
    assert book.names == {"main", "second"}
    monkeypatch.setattr(ChunkedHead, "overlaps", lambda self: False)
    assert all(torch.equal(*pair) for pair in zip(found, STEPS[step](batch, impl), strict=True))


@pytest.mark.parametrize("left_out", ["the reader of a buffer", "the writer of the logits", "the readers at the end"])
def test_every_wait_is_needed(packed, monkeypatch, book, left_out):
    """Without any one of the three the book shows a race: it would show one in the code above."""
    if left_out == "the reader of a buffer":
        monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    elif left_out == "the writer of the logits":
        monkeypatch.setattr(book.second, "wait_stream", lambda other: None)
    else:
        monkeypatch.setattr(Turns, "join", lambda self: None)
    with book:
        loss_step(packed([5, 8, 3]), "torch")
    assert book.races


def test_a_sweep_that_fails_leaves_the_current_stream_waiting_for_the_second(packed, book):
    """What the second stream still reads and writes must not be given away."""
    batch = packed([5, 8, 3])
    head = ChunkedHead(batch.hidden.bfloat16(), batch.weight.bfloat16(), None, 3)
    seen = []

    def consume(logits, chunk, out):
        seen.append(chunk)
        if len(seen) == 2:
            raise MemoryError
        logits.mul_(2)

    with book, pytest.raises(MemoryError):
        head.sweep(consume)
    assert book.main.knows["second"] == book.second.knows["second"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1000, 3000])
def test_a_card_makes_the_same_bits_on_two_streams_as_on_one(monkeypatch, num_tokens):
    def step():
        generator = torch.Generator("cuda").manual_seed(0)
        normal = lambda *shape: torch.randn(shape, device="cuda", generator=generator)
        x, w = normal(num_tokens, 64).bfloat16().requires_grad_(), normal(5003, 64).bfloat16().requires_grad_()
        ids = torch.randint(5003, (num_tokens,), device="cuda", generator=generator)
        loss, _ = fused_linear_grpo_loss(x, w, ids, ids % 4, advantages=normal(4), chunk_size=256)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    found = step()
    monkeypatch.setattr(ChunkedHead, "overlaps", lambda self: False)
    assert all(torch.equal(*pair) for pair in zip(found, step(), strict=True))

"""Single operations on which choices hang: each against what it replaces, checked against it first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tempsamp_kernels.head import mm
from torch import Tensor
from torch.nn import functional

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import HEAD_SHAPES
from bench.gpu_sections.timing import distance, in_turn, require
from tempsamp_fast.model.varlen_attention import varlen_kernel
from tempsamp_fast.rollout.answers import Answers
from tempsamp_fast.rollout.rooms import Rooms
from tempsamp_fast.rollout.sampler import draw
from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams

NUM_PATCHES, HIDDEN, WIDTH, PADDED_WIDTH = 14_336, 1280, 3420, 3456
"""Of the tower, for a video of 3584 tokens."""
NUM_TOKENS, NUM_ROWS = 5760, 256


def measure(record: Record) -> None:
    torch.manual_seed(0)
    for function in (tower_mlp, grouped_heads, gathered_keys, pinned_copy, unrounded_product, sampler, patches):
        with record.attempt(function.__name__):
            function(record)


def draw_bf16(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def compare(record: Record, label: str, runs: dict[str, Callable[[], Tensor]], rounds: int = 10) -> None:
    """The last of them is what the first replaces."""
    *_, last = runs.values()
    error = require(distance(next(iter(runs.values()))(), last()), 2e-2, f"distance of {label}")
    for name, figures in in_turn(dict(runs), rounds=rounds, warmup=min(2, rounds - 1)).items():
        record.add(f"{label}, {name}", **figures, error=error)


def patches(record: Record) -> None:
    """A convolution whose kernel is all of its input: once, since others report seconds a call."""
    x, weight = draw_bf16(NUM_PATCHES, 3, 2, 14, 14), draw_bf16(HIDDEN, 3, 2, 14, 14)
    runs = {
        "linear": lambda: functional.linear(x.flatten(1), weight.flatten(1)),
        "convolution": lambda: functional.conv3d(x, weight).flatten(1),
    }
    compare(record, "patches", runs, rounds=1)


def tower_mlp(record: Record) -> None:
    x, weight = draw_bf16(NUM_PATCHES, HIDDEN), draw_bf16(PADDED_WIDTH, HIDDEN)
    runs = {
        "padded": lambda: functional.linear(x, weight)[:, :WIDTH],
        "as it is": lambda: functional.linear(x, weight[:WIDTH]),
    }
    compare(record, f"tower, {WIDTH} of {PADDED_WIDTH}", runs)


def grouped_heads(record: Record) -> None:
    """16 heads on 2 of keys, as they are and repeated to all."""
    kernel = varlen_kernel()
    assert kernel is not None, "no variable-length attention kernel"
    query, key, value = draw_bf16(NUM_TOKENS, 16, 128), draw_bf16(NUM_TOKENS, 2, 128), draw_bf16(NUM_TOKENS, 2, 128)
    cu = torch.tensor([0, NUM_TOKENS], dtype=torch.int32, device="cuda")
    attend = lambda *keys: kernel(query, *keys, cu, cu, NUM_TOKENS, NUM_TOKENS, scale=0.09, causal=True)
    repeated = lambda: attend(*(each.repeat_interleave(8, dim=1) for each in (key, value)))
    compare(record, "attention of grouped heads", {"grouped": lambda: attend(key, value), "repeated": repeated})


def gathered_keys(record: Record) -> None:
    """The backward pass of keys that nine branches read: rows added up, and an index that is sorted first."""
    index = torch.arange(NUM_TOKENS, device="cuda").repeat(9)
    gradient = draw_bf16(len(index), 2, 128)

    def added() -> Tensor:
        total = torch.zeros(NUM_TOKENS, 2, 128, device="cuda")
        return total.index_add_(0, index, gradient.float())

    def indexed() -> Tensor:
        leaf = torch.zeros(NUM_TOKENS, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        return torch.autograd.grad(leaf[index], leaf, gradient)[0]

    compare(record, "gradients of gathered keys", {"index_add": added, "index": indexed})


def pinned_copy(record: Record) -> None:
    """A video's patches to the card: bytes from pinned memory, and float32 from pageable memory."""
    patches = torch.randint(0, 256, (NUM_PATCHES, 1176), dtype=torch.uint8)
    pinned, wide = patches.pin_memory(), patches.float()
    runs = {
        "uint8, pinned": lambda: pinned.to("cuda", non_blocking=True),
        "float32, pageable": lambda: wide.to("cuda"),
    }
    compare(record, "patches to the card", runs)


def unrounded_product(record: Record) -> None:
    """Logits of decoded tokens in float32."""
    hidden_size, vocab_size = HEAD_SHAPES["3B"]
    hidden, weight = draw_bf16(NUM_ROWS, hidden_size), draw_bf16(vocab_size, hidden_size)
    runs = {"into fp32": lambda: mm(hidden, weight.T), "into bf16": lambda: hidden @ weight.T}
    compare(record, "logits", runs)


def sampler(record: Record) -> None:
    """A token of 256 rows, by the kernel and by torch's operations, which invert the same distribution."""
    vocab_size, slots = HEAD_SHAPES["3B"][1], torch.arange(NUM_ROWS, device="cuda")
    logits = 3 * torch.randn(NUM_ROWS, vocab_size, device="cuda")
    noise = SampleNoise((0,), [f"row {index}" for index in range(NUM_ROWS)])
    for label, params in {
        "all": SamplingParams(max_completion_length=1),
        "top_k 20": SamplingParams(top_k=20, max_completion_length=1),
        "top_p .9": SamplingParams(top_p=0.9, max_completion_length=1),
    }.items():
        step = torch.zeros(1, dtype=torch.int64, device="cuda")
        answers = Answers(Rooms(), noise, params, torch.zeros_like(slots), step, vocab_size, [], [])

        def drawn(impl: str, answers: Answers = answers) -> Tensor:
            draw(logits, answers, slots, impl=impl)
            return answers.tokens.clone()

        differing = (drawn("triton") != drawn("torch")).float().mean().item()
        require(differing, 0.02, f"share of tokens drawn differently, {label}")
        for name, figures in in_turn({impl: partial(drawn, impl) for impl in ("triton", "torch")}).items():
            record.add(f"sampler, {label}, {name}", **figures, differing=differing)

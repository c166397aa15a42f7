"""How many rows of logits the fused loss should hold at a time: time and memory by chunk, for both heads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from tempsamp_kernels import fused_linear_grpo_loss
from tempsamp_kernels.head import chunk_rows
from torch import Tensor

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import HEAD_SHAPES, Size
from bench.gpu_sections.timing import distance, in_turn, memory, require

NUM_ROWS, LENGTH = 8, 1024
CHUNKS = (512, 1024, 2048, 4096, 8192)


def gradients(hidden: Tensor, weight: Tensor, token_ids: Tensor, advantages: Tensor, chunk: int) -> tuple[Tensor, ...]:
    row_ids = torch.arange(NUM_ROWS, device="cuda").repeat_interleave(LENGTH)
    loss, _ = fused_linear_grpo_loss(
        hidden, weight, token_ids, row_ids, advantages=advantages, loss_type="dapo", beta=0.0, chunk_size=chunk
    )
    return torch.autograd.grad(loss, (hidden, weight))


def measure(record: Record, heads: Sequence[Size] = ("3B", "7B")) -> None:
    for head in heads:
        hidden_size, vocab_size = HEAD_SHAPES[head]
        with record.attempt(head):
            torch.manual_seed(0)
            num_tokens = NUM_ROWS * LENGTH
            inputs = (
                torch.randn(num_tokens, hidden_size, device="cuda").bfloat16().requires_grad_(),
                (torch.randn(vocab_size, hidden_size, device="cuda") / hidden_size**0.5).bfloat16().requires_grad_(),
                torch.randint(vocab_size, (num_tokens,), device="cuda"),
                torch.randn(NUM_ROWS, device="cuda"),
            )
            default = chunk_rows(num_tokens, vocab_size, "cuda")
            expected = gradients(*inputs, default)
            runs = {chunk: partial(gradients, *inputs, chunk) for chunk in CHUNKS}
            for chunk, run in runs.items():
                worst = max(map(distance, run(), expected))
                require(worst, 1e-2, f"distance of the gradients at {chunk} rows")
            for name, figures in in_turn({str(chunk): run for chunk, run in runs.items()}).items():
                record.add(f"{head} N={num_tokens} chunk={name}", **figures, **memory(runs[int(name)]))
            record.add(f"{head} default", chunk=default)

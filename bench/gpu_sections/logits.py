"""The loss from logits that exist already, forward and backward in place, in bytes per second beside a device copy."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.bench_logits_loss import CONTENDERS, copy_seconds, plain_torch, step
from bench.gpu_sections.child import Record
from bench.gpu_sections.timing import distance, require

VOCAB, ROUNDS = 152064, 10
SHAPES = ((8, 1024), (8, 128), (64, 128))


def make_batch(num_rows: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """bf16 logits [num_rows, length + 1, VOCAB], and the other arguments of the loss."""
    torch.manual_seed(0)
    logits = torch.randn(num_rows, length + 1, VOCAB, device="cuda", dtype=torch.bfloat16)
    token_ids = torch.randint(VOCAB, (num_rows, length), device="cuda")
    pairs = zip(logits, token_ids, strict=True)
    rows = [row[:-1].float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in pairs]
    logps, noise = torch.stack(rows), 0.2 * torch.randn(2, num_rows, length, device="cuda")
    advantages = torch.randn(num_rows, device="cuda")
    return logits, {
        "old_logp": logps + noise[0],
        "ref_logp": logps + noise[1],
        "completion_ids": token_ids,
        "advantages": advantages,
    }


def measure(record: Record) -> None:
    for num_rows, length in SHAPES:
        with record.attempt(f"B={num_rows} L={length}"):
            measure_shape(record, num_rows, length)


def measure_shape(record: Record, num_rows: int, length: int) -> None:
    logits, batch = make_batch(num_rows, length)
    expected = step(plain_torch, logits, batch)[1]
    for name, function in CONTENDERS.items():
        require(distance(step(function, logits, batch)[1], expected), 1e-2, f"distance of the gradient of {name}")
    seconds: dict[str, list[float]] = {name: [] for name in [*CONTENDERS, "copy"]}
    for _ in range(ROUNDS + 1):
        for name, function in CONTENDERS.items():
            seconds[name].append(step(function, logits, batch)[0])
        seconds["copy"].append(copy_seconds(logits))
    medians = {name: median(values[1:]) for name, values in seconds.items()}  # the first round warms up
    num_bytes = logits.numel() * logits.element_size()
    copy_rate = 2 * num_bytes / medians["copy"]
    best_peer = min(value for name, value in medians.items() if name not in ("ours", "copy"))
    for name, values in seconds.items():
        moved = num_bytes * (2 if name == "copy" else 3)  # the loss reads the logits twice and writes them once
        figures: dict[str, Any] = {
            "ms": 1e3 * medians[name],
            "spread_ms": [1e3 * min(values[1:]), 1e3 * max(values[1:])],
            "gb_per_s": moved / medians[name] / 1e9,
        }
        if name == "ours":
            figures |= {
                "share_of_copy_bandwidth": moved / medians[name] / copy_rate,
                "over_best_peer": best_peer / medians[name],
                "goals": {"share_of_copy_bandwidth": ("at least", 0.85)},
            }
        record.add(f"B={num_rows} L={length} {name}", **figures)

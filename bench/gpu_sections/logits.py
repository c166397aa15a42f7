"""The loss from logits that exist already, forward and backward in place, in bytes per second beside a device copy."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from bench.bench_logits_loss import CONTENDERS, make_batch, plain_torch, prepared
from bench.gpu_sections.child import Record
from bench.gpu_sections.timing import distance, queued_ms, require

ROUNDS = 10
SHAPES = ((8, 1024), (8, 128), (64, 128))


def measure(record: Record) -> None:
    for num_rows, length in SHAPES:
        with record.attempt(f"B={num_rows} L={length}"):
            measure_shape(record, num_rows, length)


def measure_shape(record: Record, num_rows: int, length: int) -> None:
    logits, batch = make_batch(num_rows, length)
    expected = prepared(plain_torch, logits, batch)()
    for name, function in CONTENDERS.items():
        require(distance(prepared(function, logits, batch)(), expected), 1e-2, f"distance of the gradient of {name}")
    times: dict[str, list[float]] = {name: [] for name in [*CONTENDERS, "copy"]}
    target = torch.empty_like(logits)
    for _ in range(ROUNDS + 1):
        for name, function in CONTENDERS.items():
            times[name].append(queued_ms(prepared(function, logits, batch)))
        times["copy"].append(queued_ms(lambda: target.copy_(logits)))
    medians = {name: median(values[1:]) / 1e3 for name, values in times.items()}  # the first round warms up
    num_bytes = logits.numel() * logits.element_size()
    copy_rate = 2 * num_bytes / medians["copy"]
    best_peer = min(value for name, value in medians.items() if name not in ("ours", "copy"))
    for name, values in times.items():
        moved = num_bytes * (2 if name == "copy" else 3)  # the loss reads the logits twice and writes them once
        figures: dict[str, Any] = {
            "ms": 1e3 * medians[name],
            "spread_ms": [min(values[1:]), max(values[1:])],
            "gb_per_s": moved / medians[name] / 1e9,
        }
        if name == "ours":
            figures |= {
                "share_of_copy_bandwidth": moved / medians[name] / copy_rate,
                "over_best_peer": best_peer / medians[name],
            }
        if name == "ours" and (num_rows, length) == SHAPES[0]:
            figures["goals"] = {"share_of_copy_bandwidth": ("at least", 0.85)}
        record.add(f"B={num_rows} L={length} {name}", **figures)

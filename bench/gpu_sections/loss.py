"""The fused loss of both heads, forward and backward, against the contenders of bench_grpo_loss, in bf16."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from functools import partial

import torch

from bench.bench_grpo_loss import CONTENDERS, HEADS, PEERS, bare_gemms, make_batch, step
from bench.gpu_sections.child import Goal, Record
from bench.gpu_sections.timing import distance, in_turn, kernel_times, memory, require, share_of_peak
from bench.loss_contenders import LossBatch, ours
from bench.loss_error_table import errors

SHAPES = [(head, num_tokens) for num_tokens in (8192, 1024, 4096, 32768) for head in ("7B", "3B")]
ERROR_SEEDS = 3
GOAL = ("7B", 8192)
"""The shape that has goals."""
COMPILED = ("liger", "torch_compile", "ours_compiled")
"""Contenders that torch.compile takes up to a minute for, shape by shape."""


def measure(record: Record) -> None:
    for head, num_tokens in SHAPES:
        with record.attempt(f"{head} N={num_tokens}"):
            measure_shape(record, head, num_tokens)
    with record.attempt("error against fp64"):
        for seed in range(ERROR_SEEDS):
            for name, figures in errors(seed, "cuda").items():
                record.add(f"error, seed {seed}: {name}", **figures)


def gradient_distances(record: Record, label: str, batch: LossBatch, names: Collection[str]) -> dict[str, float]:
    """Of each contender's gradients from ours, without those that differ (an error each) or run out of memory.

    Raises ValueError where no other contender is left to vouch for ours.
    """
    expected_loss, *expected = step(ours, batch)
    distances = {"ours": 0.0}
    for name in [name for name in CONTENDERS if name in names and name != "ours"]:
        with record.attempt(f"{label} {name}"), suppress(torch.OutOfMemoryError, ImportError):
            loss, *gradients = step(CONTENDERS[name], batch)
            torch.testing.assert_close(loss, expected_loss, rtol=2e-2, atol=2e-3)
            worst = max(map(distance, gradients, expected))
            distances[name] = require(worst, 0.1, "distance of the gradients from ours")
    if not PEERS & distances.keys():
        raise ValueError("no contender's loss and gradients agree with ours: not timed")
    return distances


def measure_shape(
    record: Record, head: str, num_tokens: int, names: Collection[str] = tuple(CONTENDERS), beside: str = ""
) -> None:
    """names: some of the contenders. beside: what tells these rows from others of the same shape."""
    where = f"{head} N={num_tokens}{beside}"
    batch = make_batch(num_tokens, *HEADS[head])
    distances = gradient_distances(record, where, batch, names)
    runs = {name: partial(step, CONTENDERS[name], batch) for name in distances}
    times = in_turn({**runs, "bare cuBLAS": partial(bare_gemms, batch)}, rounds=10 if num_tokens <= 8192 else 4)
    flops = 6.0 * batch.hidden.numel() * len(batch.weight)
    owed = (2 * (batch.hidden.numel() + batch.weight.numel()) + 4 * batch.weight.numel()) / 2**30
    goals: dict[str, Goal] = {"over_best_peer": ("at least", 1.0)}
    if not beside:
        goals |= {"share_of_cublas": ("at least", 0.85), "gib_beyond_gradients_and_fp32_dw": ("at most", 2.0)}
    best_peer = min(times[name]["ms"] for name in PEERS & runs.keys())
    for name, figures in times.items():
        shares = {
            "tflops_per_s": flops / figures["ms"] / 1e9,
            "roofline_share": share_of_peak(flops, figures["ms"]),
        }
        label = f"{where} {name}"
        if name not in runs:
            record.add(label, **figures, **shares)
            continue
        used = memory(runs[name])
        shares |= {"gradient_distance": distances[name], **used}
        if name != "ours":
            record.add(label, **figures, **shares)
            continue
        record.add(
            label,
            **figures,
            **shares,
            share_of_cublas=times["bare cuBLAS"]["ms"] / figures["ms"],
            over_best_peer=best_peer / figures["ms"],
            gib_beyond_gradients_and_fp32_dw=used["peak_gib"] - owed,
            left_out=sorted(set(names) - distances.keys()),
            goals=goals if (head, num_tokens) == GOAL else None,
        )
    if (head, num_tokens) == GOAL and not beside:
        for name, figures in kernel_times(runs["ours"]).items():
            record.add(f"profile: {name}", **figures)

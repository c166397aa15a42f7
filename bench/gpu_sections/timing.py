"""Times by CUDA events and peak memory, of contenders that take turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.model.flops import peak_bf16_flops

QUEUED_CYCLES = 10_000_000
"""Of a GPU's clock: about 5 ms."""


def card_gib() -> float:
    """Memory of the GPU; without one, what this process may take is not known and without bound."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else math.inf


def share_of_peak(flops: float, ms: float) -> float | None:
    """Of the dense bf16 peak; None for a device that the trainer's table does not have."""
    peak = peak_bf16_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return None if peak is None else 1e3 * flops / ms / peak


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def event_ms(run: Callable[[], object]) -> float:
    """Milliseconds between an event before `run` and one after it; by the clock where there is no GPU."""
    if not torch.cuda.is_available():
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def queued_ms(run: Callable[[], object]) -> float:
    """As `event_ms`, of short work: the GPU is busy until all of it is launched, so that launching costs nothing."""
    if not torch.cuda.is_available():
        return event_ms(run)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUED_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turn(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, dict[str, Any]]:
    """All runs one after the other, round after round: {name: {"ms": median, "spread_ms": [least, most]}}."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            elapsed = event_ms(run)
            if index >= warmup:
                times[name].append(elapsed)
    return {name: {"ms": median(values), "spread_ms": [min(values), max(values)]} for name, values in times.items()}


def memory(run: Callable[[], object]) -> dict[str, float]:
    """Device memory allocated at the worst moment of `run`, in all and beyond what was there before; no GPU, none.

    What was there includes gradients that an earlier run left: only `max_allocated_gib` compares between sections.
    """
    if not torch.cuda.is_available():
        run()
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    return {"peak_gib": (most - before) / 2**30, "max_allocated_gib": most / 2**30}


def kernel_times(run: Callable[[], object], most: int = 25) -> dict[str, dict[str, float]]:
    """Of a second call of `run`: the kernels that take longest, {name: {"ms", "calls"}}; operations without a GPU."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    run()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize()
    took = lambda each: each.self_device_time_total if on_gpu else each.self_cpu_time_total
    longest = sorted(profiler.key_averages(), key=took, reverse=True)[:most]
    return {each.key[:100]: {"ms": took(each) / 1e3, "calls": each.count} for each in longest}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm of `expected`, in fp32."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def require(value: float, bound: float, what: str) -> float:
    """Return `value`. Raises ValueError, before anything is timed, unless it is within `bound` (NaN never is)."""
    if not value <= bound:
        raise ValueError(f"{what} is {value:.3g}, over {bound:.3g}: not timed")
    return value

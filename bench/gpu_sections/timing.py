"""Times by CUDA events and peak memory, of contenders that take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.flops import PEAK_BF16_TFLOPS, peak_bf16_flops


def peak_flops() -> float:
    """Dense bf16 FLOP/s of this GPU. Raises ValueError for one that is not in the trainer's table."""
    name = torch.cuda.get_device_name()
    flops = peak_bf16_flops(name)
    if flops is None:
        raise ValueError(f"the bf16 peak of {name!r} is not known; known are {', '.join(PEAK_BF16_TFLOPS)}")
    return flops


def event_ms(run: Callable[[], object]) -> float:
    """Milliseconds between an event before `run` and one after it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
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


def peak_gib(run: Callable[[], object]) -> float:
    """Device memory allocated at the worst moment of `run`, beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm of `expected`, in fp32."""
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def require(value: float, bound: float, what: str) -> float:
    """Return `value`. Raises ValueError, before anything is timed, unless it is within `bound` (NaN never is)."""
    if not value <= bound:
        raise ValueError(f"{what} is {value:.3g}, over {bound:.3g}: not timed")
    return value

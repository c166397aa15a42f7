"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def resident_gib(field: str) -> float:
    """`VmRSS`, what is resident now, or `VmHWM`, the most that ever was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def peak_resident_gib(run: Callable[[], object]) -> float:
    """What is resident at the worst moment of `run` beyond what was before it."""
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that stay resident would serve `run` unseen
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM
    before = resident_gib("VmRSS")
    run()
    return resident_gib("VmHWM") - before

"""The books of a rehearsal, by phase: launches, FLOPs, bytes, simulated seconds, waits for the device, live memory."""

from __future__ import annotations

import linecache
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

REPOSITORY = Path(__file__).parents[2]
PEAK_FLOPS = 989e12
"""Dense bf16 of an H100: what MFU is a share of."""


@dataclass(frozen=True)
class Rates:
    """How fast the pretended card is said to be. Changed by nothing but a measurement on a real one."""

    flops: float
    fp32_flops: float
    """Of matrix products in float32 (no TF32)."""
    flash_forward: float
    flash_backward: float
    bytes: float
    launch_s: float

    def seconds(self, work: Work) -> float:
        """Of `work.launches` kernels that follow each other."""
        rate = {"": self.flops, "fp32": self.fp32_flops, "flash": self.flash_forward, "flash_bwd": self.flash_backward}
        return max(work.flops / rate[work.kind], work.bytes / self.bytes, work.launches * self.launch_s)


@dataclass(frozen=True)
class Work:
    """What one operation asks of the card."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    kind: str = ""
    """Whose FLOP/s it runs at: "" of tensor cores, "fp32", "flash" or "flash_bwd"."""


ROOFLINE = Rates(800e12, 60e12, 800e12, 800e12, 3.0e12, 5e-6)
"""The most that can be hoped for, a launch lasting 5 us at least, as where the CPU cannot keep up."""
CAUTIOUS = Rates(640e12, 48e12, 350e12, 300e12, 2.55e12, 2e-6)
"""Usual efficiencies of kernels, never starved."""
REPLAYED = Rates(800e12, 60e12, 800e12, 800e12, 3.0e12, 2e-6)
"""The roofline of kernels inside a CUDA graph."""


@dataclass
class Phase:
    """The books of one part of a scenario; parts inside it have their own, and are counted here too."""

    name: str
    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    roofline_s: float = 0.0
    cautious_s: float = 0.0
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    operations: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 5))
    """By name: calls, launches, FLOPs, bytes, cautious seconds."""

    def book(self, name: str, work: Work, roofline: Rates) -> None:
        cautious_s = CAUTIOUS.seconds(work)
        self.launches += work.launches
        self.flops += work.flops
        self.bytes += work.bytes
        self.roofline_s += roofline.seconds(work)
        self.cautious_s += cautious_s
        row = self.operations[name]
        for index, value in enumerate((1, work.launches, work.flops, work.bytes, cautious_s)):
            row[index] += value

    def figures(self) -> dict[str, Any]:
        """What goes into the results."""
        return {
            "flops": self.flops,
            "launches": self.launches,
            "waits": sum(self.waits.values()),
            "peak_gib": round(self.peak / 2**30, 2),
            "roofline_ms": round(1e3 * self.roofline_s, 2),
            "cautious_ms": round(1e3 * self.cautious_s, 2),
        }


class Ledger:
    """Where everything is written down."""

    def __init__(self) -> None:
        self.live = 0
        self.base = 0
        """Of `live`, what scenarios before this one have left behind; not in any peak."""
        self.peak = 0
        self.violations: list[str] = []
        """What would be an error, or a wrong result, on a card."""
        self.capturing: list[tuple[str, Work]] | None = None
        """The operations of a CUDA graph that is being recorded."""
        self.phases: dict[str, Phase] = {}
        self.seconds = 0.0
        """The simulated clock, cautious."""
        self._open: list[Phase] = []
        self._storages: dict[int, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Book what happens inside under `name` as well."""
        opened = self.phases.setdefault(name, Phase(name))
        opened.peak = max(opened.peak, self.live - self.base)
        self._open.append(opened)
        try:
            yield opened
        finally:
            self._open.remove(opened)

    def launch(self, name: str, work: Work) -> None:
        if not work.launches:
            return
        if self.capturing is not None:
            self.capturing.append((name, work))  # recorded, not run
            return
        self._book(name, work, ROOFLINE)

    def replay(self, recorded: list[tuple[str, Work]]) -> None:
        """One launch of a whole graph."""
        self._book("graph launch", Work(launches=1), ROOFLINE)
        for name, work in recorded:
            self._book(name, work, REPLAYED)

    def _book(self, name: str, work: Work, roofline: Rates) -> None:
        self.seconds += CAUTIOUS.seconds(work)
        for phase in self._open:
            phase.book(name, work, roofline)

    def wait(self, reason: str) -> None:
        """The CPU waits until the device has done all it was given."""
        line = place()
        if self.capturing is not None:
            self.violations.append(f"a CUDA graph cannot record a wait: {reason} at {line}")
        for phase in self._open:
            phase.waits[f"{line}: {reason}"] += 1

    def hold(self, tensor: Tensor) -> None:
        """The memory behind a fake tensor, until it is dropped."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // 512) * 512
        self._storages[key] = size
        weakref.finalize(storage, self._drop, key)
        self.live += size
        self.peak = max(self.peak, self.live)
        for phase in self._open:
            phase.peak = max(phase.peak, self.live - self.base)

    def _drop(self, key: int) -> None:
        self.live -= self._storages.pop(key, 0)


OUTSIDE = ("/torch/", "/bench/rehearsal/", "/triton/", "contextlib.py", "<frozen", "/functools.py", "<string>")


def place() -> str:
    """`file qualified.function: code` of the innermost frame that belongs neither to torch nor to the rehearsal itself.

    Of a frame in another package, followed by the innermost one of this project.
    """
    frame, found = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in OUTSIDE):
            is_own = file.startswith(str(REPOSITORY))
            name = (
                file[len(str(REPOSITORY)) + 1 :] if is_own else file.partition("site-packages/")[2] or Path(file).name
            )
            code = linecache.getline(file, frame.f_lineno).strip()
            found = f"{found} < " if found else ""
            found += f"{name} {frame.f_code.co_qualname}" + (f": {code}" if not found else "")
            if is_own:
                return found
        frame = frame.f_back
    return found or "the autograd engine"


def inside(function: str) -> bool:
    """Whether a function of this name is being run."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame is not None


LEDGER = Ledger()

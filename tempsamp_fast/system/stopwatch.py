"""Where the time of a step goes."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds per named part of a step; on a GPU, until its work is done, not only queued."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget all laps; the first one starts now."""
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `time/<name>_s`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"time/{name}_s"] = self.seconds.get(f"time/{name}_s", 0.0) + now - self._started
        self._started = now

    def total(self) -> dict[str, float]:
        """All laps and their sum, `time/step_s`."""
        return self.seconds | {"time/step_s": sum(self.seconds.values())}

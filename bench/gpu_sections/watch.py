"""What the GPU does meanwhile, and its settings as found, read through nvidia-smi; nothing is ever set."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

LIVE = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "busy_percent": "utilization.gpu", "watts": "power.draw"}
SETTINGS = {
    "driver": "driver_version",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_watts": "power.limit",
}


def query(fields: Iterable[str]) -> list[str]:
    """The command that prints these fields of the first GPU as one line."""
    return ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def settings() -> dict[str, str] | None:
    """Driver, clock and power limits; None where nvidia-smi is missing or does not answer with all of them."""
    if shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(query(SETTINGS.values()), capture_output=True, text=True, check=False)
    values = [value.strip() for value in answer.stdout.split(",")]
    return dict(zip(SETTINGS, values, strict=True)) if len(values) == len(SETTINGS) else None


def summarise(lines: Iterable[str]) -> dict[str, Any] | None:
    """Samples of `LIVE`, one line each: median clocks and power, mean busy share; None without a whole sample."""
    samples = []
    for line in lines:
        parts = line.split(",")
        if len(parts) == len(LIVE) and all(part.strip().replace(".", "", 1).isdigit() for part in parts):
            samples.append([float(part) for part in parts])
    if not samples:
        return None
    columns = dict(zip(LIVE, zip(*samples, strict=True), strict=True))
    busy = columns.pop("busy_percent")
    return {
        **{name: median(values) for name, values in columns.items()},
        "max_sm_mhz_seen": max(columns["sm_mhz"]),
        "busy_share": fmean(busy) / 100,
        "num_samples": len(samples),
    }


class GpuWatch:
    """Samples the first GPU once a second while the context is open."""

    def __enter__(self) -> GpuWatch:
        self._file = tempfile.TemporaryFile("w+")
        self._process = None
        if shutil.which("nvidia-smi"):
            self._process = subprocess.Popen([*query(LIVE.values()), "-l", "1"], stdout=self._file)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
        self._file.seek(0)
        self._lines = self._file.read().splitlines()
        self._file.close()

    def summary(self) -> dict[str, Any] | None:
        """Of the closed context; None without nvidia-smi."""
        return summarise(self._lines)

"""Items one after the other in a worker process, each within its box, its result on disk before the next begins.

What a worker has measured outlives it: its rows are in a file from the first one on. A worker that is over its item's
box, or dies, is replaced, and the rest goes on. Called again with the same folder, a run goes on after the last item
whose line is there.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.gpu_sections.watch import GpuWatch

GATE_IS_RED, OVER, DONE = 3, 4, 0
"""Exit codes: a gate failed and nothing after it was run; the time was over before the last item; all were run."""
LEAST_S = 15.0
"""Seconds that are worth beginning an item for."""


@dataclass(frozen=True)
class Item:
    """One thing to measure."""

    name: str
    section: str
    """Of bench/gpu.py's results, where its rows belong."""
    box_s: float
    """The most that it may take."""
    is_gate: bool = False
    """Whether an error in it ends the run: nothing after it would mean anything."""


class Worker(Protocol):
    """A process that does one item at a time."""

    def begin(self, item: str, rows: Path) -> None:
        """Start an item, which keeps `{"rows": [...], "error": ...}` in the file `rows`; waits for a new process."""

    def wait(self, seconds: float) -> str:
        """ "done" when the item has ended, "spent" if the process is of no use after it, "died" when the process has
        ended or did not start in time, "running" after so many seconds."""

    def kill(self) -> None:
        """End the process and everything that it started."""


class Orchestrator:
    """Runs items and writes `<name>.jsonl` into a folder: `{"item", "section", "outcome", "seconds", "rows", "error"}`.

    start_worker: called at first, and after a worker was killed or has died.
    conditions: what goes into every line besides.
    clock: seconds; limit_s: of the whole run, counted from here on.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        out: Path,
        limit_s: float,
        start_worker: Callable[[], Worker],
        conditions: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items, self._out, self._start_worker = items, out, start_worker
        self._conditions, self._clock = conditions, clock
        self._ends = clock() + limit_s
        self._file = out / f"{name}.jsonl"
        self._worker: Worker | None = None
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """One of the exit codes above; a gate that was red in an earlier call still is."""
        lines = {line["item"]: line for line in read_lines(self._file)}
        try:
            for item in self._items:
                if item.name not in lines:
                    left = self._ends - self._clock()
                    if left < LEAST_S:
                        return OVER
                    line = self._perform(item)
                    if line is None:
                        return OVER
                    lines[item.name] = line
                if item.is_gate and lines[item.name]["error"]:
                    return GATE_IS_RED
            return DONE
        finally:
            self._dismiss()

    def _perform(self, item: Item) -> dict[str, Any] | None:
        """None where starting a worker took the time that was left."""
        rows = self._out / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', item.name)}.rows.json"
        rows.unlink(missing_ok=True)
        self._worker = self._worker or self._start_worker()
        with GpuWatch() as watch:
            self._worker.begin(item.name, rows)
            began = self._clock()
            box_s = min(item.box_s, self._ends - began)
            if box_s < min(item.box_s, LEAST_S):
                return None
            outcome = self._worker.wait(box_s)
        if outcome != "done":
            self._dismiss()
        kept = json.loads(rows.read_text()) if rows.exists() else {"rows": [], "error": "did not start"}
        if outcome == "running":
            kept["error"] = f"stopped after {box_s:.0f} s"
        line = {
            "item": item.name,
            "section": item.section,
            "outcome": {"running": "stopped", "spent": "done"}.get(outcome, outcome),
            "seconds": round(self._clock() - began, 1),
            "gpu_watch": watch.summary(),
            **kept,
            **self._conditions,
        }
        append_line(self._file, line)
        rows.unlink(missing_ok=True)
        return line

    def _dismiss(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    """Add it to a file of JSON lines, on disk when this returns. What a kill left of an earlier line is cut off."""
    whole = "".join(f"{json.dumps(each)}\n" for each in read_lines(file))
    with file.open("r+" if file.exists() else "w") as stream:
        stream.seek(len(whole.encode()))
        stream.truncate()
        stream.write(json.dumps(line) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def collected(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Results by section, as bench/gpu.py keeps them, of the lines of one run or of several."""
    sections: dict[str, dict[str, Any]] = {}
    for line in (line for file in files for line in read_lines(file)):
        own = ("item", "section", "outcome", "rows", "gpu_watch")
        rest = {name: value for name, value in line.items() if name not in own}
        empty = {"rows": [], "seconds": 0.0, "error": None, "gpu_watch": {}}
        found = sections.setdefault(line["section"], {**rest, **empty})
        found["rows"] += line["rows"]
        found["gpu_watch"][line["item"]] = line.get("gpu_watch")
        found["seconds"] = round(found["seconds"] + line["seconds"], 1)
        errors = [found["error"], line["error"] and f"{line['item']}: {line['error']}"]
        found["error"] = "; ".join(filter(None, errors)) or None
    return sections

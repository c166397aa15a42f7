"""The process in which items are measured, one after the other: `python -m bench.gpu_runs.worker MODULE:TABLE`.

TABLE maps names to functions of a `Record`. Each line on standard input is a request, `{"item": ..., "rows": ...}`,
each line on the answers' descriptor says that it has been served, the first one that all is imported. What items print
goes to the log.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TextIO

import torch

from bench.gpu_sections.child import Record, run
from bench.gpu_sections.timing import synchronize

PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""
START_S = 90.0
"""Most that a process may take to import what it needs."""


class WorkerProcess:
    """A `Worker` that is a process of its own, with its children in a group that is ended together."""

    def __init__(self, table: str, log: Path, environment: dict[str, str]) -> None:
        """table: MODULE:TABLE. log: what it prints is added there."""
        answers, mine = os.pipe()
        with log.open("a") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu_runs.worker", table, str(mine)],
                stdin=subprocess.PIPE, stdout=stream, stderr=stream, text=True, env=environment,
                start_new_session=True, pass_fds=[mine],
            )  # fmt: skip
        os.close(mine)
        self._answers, self._is_ready = os.fdopen(answers), False

    def begin(self, item: str, rows: Path) -> None:
        """See `Worker.begin`."""
        self._is_ready = self._is_ready or self._answer(START_S) == "done"
        if not self._is_ready:
            return  # `wait` tells
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"item": item, "rows": str(rows)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # `wait` tells

    def wait(self, seconds: float) -> str:
        """See `Worker.wait`."""
        return self._answer(seconds) if self._is_ready else "died"

    def _answer(self, seconds: float) -> str:
        ready, _, _ = select.select([self._answers], [], [], max(0.0, seconds))
        if not ready:
            return "running"
        answer = self._answers.readline()
        return json.loads(answer)["outcome"] if answer else "died"

    def kill(self) -> None:
        """See `Worker.kill`."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()


def serve(table: dict[str, Callable[[Record], None]], requests: TextIO, answers: TextIO) -> None:
    """Say that all is ready, then do what is asked for until there are no more requests."""
    print(json.dumps({"outcome": "done"}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        run(lambda name=request["item"]: table[name], Path(request["rows"]))  # type: ignore[misc]
        print(json.dumps({"outcome": "spent" if is_spent() else "done"}), file=answers, flush=True)


def is_spent() -> bool:
    """Whether an item has left what would spoil others: a CUDA context that is lost, or an open process group."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def end_with_parent() -> None:
    """Whoever ends the orchestrator ends its worker: another one may be about to take the card."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    module, _, name = sys.argv[1].partition(":")
    with os.fdopen(int(sys.argv[2]), "w") as answers:
        serve(getattr(import_module(module), name), sys.stdin, answers)


if __name__ == "__main__":
    main()

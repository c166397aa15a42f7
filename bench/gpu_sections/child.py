"""One section in a process of its own: `python -m bench.gpu_sections.child NAME FILE`."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.runlog import write_json

Goal = tuple[str, float]
"""("at least" or "at most", bound)."""


class Record:
    """Rows of figures, kept in `file` from the first one on, with an error until `close`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self._write("ended before its end")

    def add(self, label: str, *, goals: Mapping[str, Goal] | None = None, **figures: Any) -> None:
        """One row; `goals` belong to some of its figures."""
        row = {"label": label, **figures}
        if goals:
            row["goals"] = {name: list(goal) for name, goal in goals.items()}
        self.rows.append(row)
        self._write("ended before its end")

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """What fails inside is an error of the section, named by `label`, and the section goes on."""
        try:
            yield
        except Exception as error:  # whatever a contender or a check raises is its result
            traceback.print_exc()
            self.errors.append(f"{label}: {describe(error)}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """The section has come to its end."""
        self._write("; ".join(self.errors) or None)

    def _write(self, error: str | None) -> None:
        write_json(self.file, {"rows": self.rows, "error": error})


def describe(error: Exception) -> str:
    """Kind and first line, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def run(measure: Callable[[Record], None], file: Path) -> int:
    """Exit code: 0, or 1 when something failed."""
    record = Record(file)
    with record.attempt("section"):
        measure(record)
    record.close()
    return int(bool(record.errors))


if __name__ == "__main__":
    sys.exit(run(import_module(f"bench.gpu_sections.{sys.argv[1]}").measure, Path(sys.argv[2])))

"""One section in a process of its own: `python -m bench.gpu_sections.child NAME FILE`."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.gpu_sections.timing import card_gib
from tempsamp_fast.run.log import write_json

Goal = tuple[str, float]
"""("at least" or "at most", bound)."""
FILLED_SHARE = 0.95
"""Of a card's memory: the rest goes to libraries and to gaps between tensors."""


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

    def fits(self, label: str, gib: float) -> bool:
        """Whether so much memory is likely to be had on this card; where not, a row says why `label` was skipped."""
        card = card_gib()
        if gib <= FILLED_SHARE * card:
            return True
        self.add(label, skipped=f"takes about {gib:.0f} GiB by arithmetic, and this GPU has {card:.0f}")
        return False

    def has(self, label: str, *modules: str) -> bool:
        """Whether these modules are installed; where not, a row says why `label` was skipped."""
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            self.add(label, skipped=f"needs {', '.join(missing)}, not installed")
        return not missing

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


def run(find: Callable[[], Callable[[Record], None]], file: Path) -> int:
    """Find and run the function that measures a section. Exit code: 0, or 1 when something failed, an import say."""
    record = Record(file)
    with record.attempt("section"):
        find()(record)
    record.close()
    return int(bool(record.errors))


if __name__ == "__main__":
    sys.exit(run(lambda: import_module(f"bench.gpu_sections.{sys.argv[1]}").measure, Path(sys.argv[2])))

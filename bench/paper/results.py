"""The results file of the campaign: what made it, the cold starts, and one record per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Results = dict[str, Any]
"""`planned` and `done` runs, `commit`, `settings`, `machine`, `num_queries`, `constant_span`, `cold_starts` by seed,
and `runs` by name: what was planned of the run, and its `record.record_of`."""


def read_results(path: Path) -> Results:
    """The results file. Raises ValueError where there is none."""
    if not path.exists():
        raise ValueError(f"{path}: no results yet; make the runs first")
    return json.loads(path.read_text())


def check_same(path: Path, kept: Results, made_of: Results) -> None:
    """Raise ValueError, naming what differs, if the results were made by other code or with other settings."""
    for name, value in made_of.items():
        if kept[name] != value:
            raise ValueError(
                f"{path}: its runs have {name} {kept[name]!r}, this checkout has {value!r}; "
                "check that out, or write to another file with --results"
            )

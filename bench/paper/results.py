"""The results file of the campaign: what made it, the cold starts, and one record per run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Results = dict[str, Any]
"""`planned` and `done` runs, `settings`, `machine`, `num_queries`, `constant_span`, `cold_starts` by seed,
and `runs` by name: what was planned of the run, its `record.record_of`, its cost and `commit`."""


def read_results(path: Path) -> Results:
    """The results file. Raises ValueError where there is none."""
    if not path.exists():
        raise ValueError(f"{path}: no results yet; make the runs first")
    return json.loads(path.read_text())


def check_same_settings(path: Path, kept: Results, settings: Results) -> None:
    """Raise ValueError, naming what differs, if the file's runs were made with other settings; add those it lacks."""
    for name, value in settings.items():
        if kept.setdefault(name, value) != value:
            raise ValueError(
                f"{path}: its runs have {name} {kept[name]!r}, this checkout has {value!r}; "
                "check that out, or write to another file with --results"
            )


def check_same_start(name: str, kept: Results | None, scores: Results) -> None:
    """Raise ValueError if a start was scored otherwise, by metrics of both, when the runs so far began from it."""
    if kept is not None and any(kept.get(metric, score) != score for metric, score in scores.items()):
        raise ValueError(
            f"start {name!r} came out with {scores}, and earlier runs began from one with {kept}: this code or machine "
            "computes otherwise; write to another file with --results"
        )

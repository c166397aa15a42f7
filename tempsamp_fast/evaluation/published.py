"""Published results from `published.yaml`, and a table of ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")
METRICS = {
    "miou": "mIoU",
    "r1@0.3": "R1@0.3",
    "r1@0.5": "R1@0.5",
    "r1@0.7": "R1@0.7",
    "mr_map": "MR mAP",
    "mr_map@0.5": "mAP@0.5",
    "mr_map@0.75": "mAP@0.75",
    "hl_map": "HL mAP",
    "hit@1": "HIT@1",
    "c_acc": "C-Acc",
    "tiou": "tIoU",
    "tf1@0.3": "tF1@0.3",
    "tf1@0.5": "tF1@0.5",
    "tf1@0.7": "tF1@0.7",
    "etf1": "EtF1",
    "auc": "AUC",
    "parse_rate": "parsed",
}
"""Metrics of `scoring.score_rows` and of protocols by the heading they are printed under."""
DEFAULT_TABLES = ("main", "out of domain", "field of 2026")
MIXED_PROTOCOLS = "protocols differ (last column): figures compare within one protocol only"
MIXED = "mixed"
MIXED_NOTE = "mixed: the better of both modes for each query, chosen by looking at the truth; an upper bound, no result"


@dataclass(frozen=True)
class Published:
    """One row of a published table."""

    table: str
    test: str
    """A name in `catalogue.DATASETS`."""
    method: str
    mode: str
    metrics: Mapping[str, float]
    """In per cent, by the names of `METRICS`."""
    train: str | None = None
    """What it was trained on, where that is not the training set that belongs to `test`."""
    recipe: str | None = None
    """The file of configs/ that repeats it, without suffix; None for other people's rows."""
    flags: str = ""
    """Command line words that the recipe takes besides."""
    protocol: str = "paper"
    """A name of `protocols.PROTOCOLS`, or `-` where it is not stated."""
    source: str = ""
    """Where the figures are from, and of which model they are where the method does not say so."""

    @property
    def label(self) -> str:
        return f"{self.method} ({self.train})" if self.train else self.method

    def describe(self) -> str:
        """One line, as recipes carry it in a comment."""
        figures = ", ".join(f"{METRICS[name]} {value:.1f}" for name, value in self.metrics.items())
        return f"{self.test}, {self.label}, {self.mode}: {figures}" + (f" ({self.flags})" if self.flags else "")


def published_results() -> list[Published]:
    """Every row of the file, in its order."""
    content = yaml.safe_load(FILE.read_text())
    rows = []
    for table, entries in content.items():
        for entry in entries if isinstance(entries, list) else []:
            metrics = {name: entry.pop(name) for name in METRICS if name in entry}
            usual = content["sources"].get(table, content["source"])
            rows.append(Published(table=table, metrics=metrics, **{"source": usual, **entry}))
    return rows


def comparison(
    ours: Sequence[Mapping[str, Any]], num_queries: int, test: str | None, tables: Sequence[str] | None = DEFAULT_TABLES
) -> str:
    """Our scores (`mode`, `protocol` and metrics in [0, 1]) above the published ones for the data set `test`, in per
    cent. Where they are of several protocols, a line says so.

    tables: which published tables; None for all. Nothing is published for `test=None`, a data set of one's own.
    """
    names = [name for name in METRICS if name in ours[0]]
    theirs = [
        row
        for row in published_results()
        if row.test == test and (tables is None or row.table in tables) and set(names) & row.metrics.keys()
    ]
    lines = [f"{test or 'own data'}: {num_queries} queries, in per cent"]
    lines.append(_line("", "mode", [METRICS[name] for name in names], "protocol"))
    for row in ours:
        in_per_cent = {name: 100 * row[name] for name in names if name in row}
        lines.append(_line("ours", row["mode"], _cells(names, in_per_cent), row["protocol"]))
    for source in dict.fromkeys(row.source for row in theirs):
        lines.append(f"published: {source}")
        lines += [
            _line(row.label, row.mode, _cells(names, row.metrics), row.protocol)
            for row in theirs
            if row.source == source
        ]
    if len({row["protocol"] for row in ours} | {row.protocol for row in theirs}) > 1:
        lines.append(MIXED_PROTOCOLS)
    if MIXED in [row["mode"] for row in ours] + [row.mode for row in theirs]:
        lines.append(MIXED_NOTE)
    return "\n".join(lines)


def _cells(names: Sequence[str], metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:.1f}" if name in metrics else "" for name in names]


def _line(label: str, mode: str, cells: Sequence[str], protocol: str) -> str:
    return f"{label:<30}{mode:<8}" + "".join(f"{cell:>9}" for cell in cells) + f"  {protocol}"

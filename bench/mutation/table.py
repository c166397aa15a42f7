"""The record of a mutation run: bench/results/mutants.json and the table beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.mutation.mutant import Mutant


def write_table(
    mutants: Sequence[Mutant], verdicts: Mapping[str, dict[str, Any]], folder: Path, commit: str | None = None
) -> None:
    """Every mutant with its verdict as JSON, and a table by area with the survivors below it.

    A verdict is of `commit`; where there is none, that of the record in `folder` stays, of the commit it was made at.
    """
    path = folder / "mutants.json"
    kept = {row["name"]: row for row in (json.loads(path.read_text()) if path.exists() else [])}
    rows = []
    for mutant in mutants:
        found = {"verdict": "open", "test": "", "commit": (commit or "")[:7], **verdicts.get(mutant.name, {})}
        if found["verdict"] == "open":
            found |= kept.get(mutant.name, {})
        judgement = {"judgement": mutant.judgement} if mutant.judgement else {}
        verdict = {name: found[name] for name in ("verdict", "test", "commit")}
        rows.append({"name": mutant.name, "file": mutant.file, "why": mutant.why, **verdict, **judgement})
    (folder / "mutants.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["# Mutants: small faults put into the code, and the tests that notice", ""]
    noticed = sum(row["verdict"] in ("killed", "timed out") for row in rows)
    judged = sum(row["verdict"] != "open" for row in rows)
    counts = f"{noticed} of {judged} noticed, {len(rows) - judged} not judged yet"
    if earlier := sum(row["verdict"] != "open" and row["commit"] != (commit or "")[:7] for row in rows):
        counts += f"; {earlier} of the verdicts are of earlier commits"
    lines += [f"`python bench/mutants.py`{f' at {commit}' if commit else ''}: {counts}.", ""]
    lines += [
        "| module | mutants | killed | timed out | survived | open | by which tests |",
        "|---|---|---|---|---|---|---|",
    ]
    for area in dict.fromkeys(row["name"].rpartition("/")[0] for row in rows):
        own = [row for row in rows if row["name"].startswith(f"{area}/")]
        count = Counter(row["verdict"] for row in own)
        files = Counter(_test_file(row["test"]) for row in own if row["test"])
        by = ", ".join(f"{name} {number}" for name, number in files.most_common(4))
        figures = (len(own), *(count[verdict] for verdict in ("killed", "timed out", "survived", "open")))
        lines.append(f"| {area} | {' | '.join(map(str, figures))} | {by} |")
    survivors = [(mutant, row) for mutant, row in zip(mutants, rows, strict=True) if row["verdict"] == "survived"]
    if survivors:
        lines += ["", "## Survivors", "", "| mutant | fault | it would | judged |", "|---|---|---|---|"]
        lines += [
            f"| {mutant.name} | {_code(mutant.old)} → {_code(mutant.new)} | {mutant.why} | {mutant.judgement or ''} |"
            for mutant, _ in survivors
        ]
    (folder / "mutants.md").write_text("\n".join(lines) + "\n")


def _test_file(test: str) -> str:
    return Path(test.partition("::")[0].partition(" ")[0]).stem.removeprefix("test_")


def _code(text: str) -> str:
    """Source text inside a table cell."""
    return f"`{' '.join(text.split())}`".replace("|", "\\|") if text.strip() else "nothing"

"""A sample of the fault campaign (`bench/faults.py`): runs killed before a change of a file and after a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest


def campaign(words: list[str]) -> None:
    from bench import faults

    sys.argv[1:] = words
    raise SystemExit(faults.main())


@pytest.mark.slow
def test_killed_runs_go_on_to_the_bit_of_the_undisturbed_one(rank_server, tmp_path: Path) -> None:
    """Runs are disturbed until two kills have landed."""
    results, log = tmp_path / "faults.json", tmp_path / "logs"
    words = ["--only", "kills", "--kills", "2", "--work", str(tmp_path / "work"), "--results", str(results)]
    rank_server.run(log, 1, words, "tests.faults.test_kills:campaign")
    cases = json.loads(results.read_text())["kills"]
    assert {case["outcome"] for case in cases.values()} == {"equal"}
    landed = [where for case in cases.values() for where in case["killed"]]
    assert len(landed) >= 2 and "before" in {where.split()[0] for where in landed}
    printed = (log / "rank_0.log").read_text()
    assert f"{len(cases)} of {len(cases)} as they must, {len(landed)} kills landed" in printed

"""A sample of the fault campaign (`bench/faults.py`): runs killed before a change of a file and after a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_killed_runs_go_on_to_the_bit_of_the_undisturbed_one(tmp_path: Path) -> None:
    """Runs are disturbed until four kills have landed."""
    results = tmp_path / "faults.json"
    command = [sys.executable, str(REPOSITORY / "bench/faults.py"), "--only", "kills", "--kills", "4"]
    words = ["--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert results.exists(), done.stderr
    cases = json.loads(results.read_text())["kills"]
    assert {case["outcome"] for case in cases.values()} == {"equal"}, done.stderr
    landed = [where for case in cases.values() for where in case["killed"]]
    assert len(landed) >= 4 and {where.split()[0] for where in landed} == {"before", "after"}
    assert f"{len(cases)} of {len(cases)} as they must, {len(landed)} kills landed" in done.stdout
    assert done.returncode == 0

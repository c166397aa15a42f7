"""A sample of the fault campaign (`bench/faults.py`): two ranks, one of which is killed while it samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_other_rank_ends_by_the_name_of_the_one_that_was_killed_and_both_go_on(tmp_path: Path) -> None:
    results, name = tmp_path / "faults.json", "rank 1 gets SIGKILL during rollout"
    command = [sys.executable, str(REPOSITORY / "bench/faults.py"), "--only", "ranks", "--cases", name]
    words = ["--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert results.exists(), done.stderr
    cases = json.loads(results.read_text())["ranks"]
    assert name in cases and all(case_name.startswith(name) for case_name in cases)
    for case in cases.values():
        assert case["outcome"] == "ended by name" and "error: rank 1 " in case["line"], case
    assert done.returncode == 0

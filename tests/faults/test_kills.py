"""A sample of the fault campaign (`bench/faults.py`): two runs killed before a change of a file, two after a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_killed_runs_go_on_to_the_bit_of_the_undisturbed_one(tmp_path: Path) -> None:
    results = tmp_path / "faults.json"
    command = [sys.executable, str(REPOSITORY / "bench/faults.py"), "--only", "kills", "--kills", "4"]
    words = ["--work", str(tmp_path / "work"), "--results", str(results)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert results.exists(), done.stderr
    outcomes = {name: case["outcome"] for name, case in json.loads(results.read_text())["kills"].items()}
    assert outcomes == dict.fromkeys(("kill 000", "kill 001", "kill 002", "kill 003"), "equal"), done.stderr
    assert done.returncode == 0

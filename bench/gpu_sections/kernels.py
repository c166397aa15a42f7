"""The tests on this GPU, where nothing may skip for want of one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu_sections.child import Record

ROOT = Path(__file__).parents[2]
COMPILED = ["tests/kernels", "tests/video/test_nv12.py", "-m", "not gpu and not slow"]
NUM_WORKERS = 8
COMPILED_LABEL, MARKED_LABEL = "kernel tests, compiled", "tests marked gpu"
CUT = 2
"""pytest's exit code of a run that did not come to its end."""
PARALLEL = (COMPILED_LABEL, MARKED_LABEL)


def all_suites() -> dict[str, list[str]]:
    """Arguments of pytest: the files that have tests marked gpu, folder by folder, then the kernels' other tests.

    Other files need packages that a GPU machine may lack, and a folder's fixtures too: so each has a run of its own.
    """
    suites: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "pytest.mark.gpu" in path.read_text():
            file = path.relative_to(ROOT)
            suites.setdefault(f"tests marked gpu, {file.parent}", ["-m", "gpu"]).append(str(file))
    return {**suites, COMPILED_LABEL: COMPILED}


def marked_at_once(seconds: float) -> list[str]:
    """Arguments of pytest for all tests marked gpu in one run, the rollout's first; after so many seconds it reports.

    Without those that compile for minutes: of flex attention and of flash-linear-attention's kernels.
    """
    files = [name for selection in all_suites().values() if selection is not COMPILED for name in selection[2:]]
    files.sort(key=lambda name: "rollout" not in name)
    return ["-m", "gpu", "-k", "not flex and not qwen3_5", *within(seconds), *files]


def within(seconds: float) -> list[str]:
    """Arguments with which pytest starts no further test after so many seconds, where its plug-in is installed."""
    return [f"--session-timeout={seconds:.0f}"] if find_spec("pytest_timeout") else []


def counts(junit_xml: str) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit report."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))
    return {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }


def run_tests(selection: list[str]) -> dict[str, int]:
    """Counts and exit code of a pytest run with TEMPSAMP_REQUIRE_GPU=1. Raises RuntimeError if it leaves no report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
        ended = subprocess.run(
            [*command, f"--junit-xml={report}", *selection],
            cwd=ROOT,
            env={**os.environ, "TEMPSAMP_REQUIRE_GPU": "1"},
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if not report.exists():
            raise RuntimeError(f"pytest ended with exit code {ended.returncode} and no report")
        return {**counts(report.read_text()), "exit_code": ended.returncode}


def measure(record: Record, suites: Mapping[str, list[str]] | None = None) -> None:
    """suites: arguments of pytest by label; None: `all_suites`. Those of one file or folder alone share no workers."""
    for label, selection in (all_suites() if suites is None else suites).items():
        workers = ["-n", str(NUM_WORKERS)] if label in PARALLEL and find_spec("xdist") else []
        with record.attempt(label):
            found = run_tests([*workers, *selection])
            record.add(label, **found, goals={"failures": ("at most", 0), "errors": ("at most", 0)})
            assert found["tests"] > found["skipped"], "no test ran"
            assert found["exit_code"] != CUT, "ended before its last test"
            assert not found["failures"] + found["errors"], f"{found['failures'] + found['errors']} tests failed"

"""The tests on this GPU, where nothing may skip for want of one, and compute-sanitizer over every kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.gpu_sections.child import Record

ROOT = Path(__file__).parents[2]
SUITES = {
    "tests marked gpu": ["tests", "-m", "gpu"],
    "kernel tests, compiled": ["tests/kernels", "tests/video/test_nv12.py", "-m", "not gpu and not slow"],
}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def counts(junit_xml: str) -> dict[str, int]:
    """Tests, failures, errors and skips of a JUnit report."""
    suites = list(ElementTree.fromstring(junit_xml).iter("testsuite"))
    return {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }


def run_tests(selection: list[str]) -> dict[str, int]:
    """Counts of one pytest run with TEMPSAMP_REQUIRE_GPU=1."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", f"--junit-xml={report}", *selection]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "TEMPSAMP_REQUIRE_GPU": "1"}, check=False)
        return counts(report.read_text())


def sanitize(tool: str) -> int:
    """Exit code of `small_shapes` under one tool of compute-sanitizer: 0 without a finding."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=_kernel"]
    # With PyTorch's caching allocator a read past a tensor's end would land in a neighbour and go unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "-m", "bench.gpu_sections.small_shapes"]
    return subprocess.run([*command, *program], cwd=ROOT, env=environment, check=False).returncode


def measure(record: Record) -> None:
    for label, selection in SUITES.items():
        with record.attempt(label):
            found = run_tests(selection)
            record.add(label, **found, goals={"failures": ("at most", 0), "errors": ("at most", 0)})
            assert found["tests"] > found["skipped"], "no test ran"
            assert not found["failures"] + found["errors"], f"{found['failures'] + found['errors']} tests failed"
    if shutil.which("compute-sanitizer") is None:
        record.add("compute-sanitizer", found="not on the PATH: memory errors not looked for")
        return
    for tool in TOOLS:
        with record.attempt(tool):
            code = sanitize(tool)
            record.add(f"compute-sanitizer {tool}", exit_code=code, goals={"exit_code": ("at most", 0)})
            assert code == 0, f"exit code {code}"

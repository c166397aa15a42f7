"""Memory errors and races: compute-sanitizer over every kernel on small shapes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu_sections.child import Record

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def measure(record: Record, tools: Sequence[str] = TOOLS) -> None:
    if shutil.which("compute-sanitizer") is None:
        record.add("compute-sanitizer", skipped="not on the PATH: memory errors not looked for")
        return
    for tool in tools:
        with record.attempt(tool):
            code = sanitize(tool)
            record.add(f"compute-sanitizer {tool}", exit_code=code, goals={"exit_code": ("at most", 0)})
            assert code == 0, f"exit code {code}"


def sanitize(tool: str) -> int:
    """Exit code of `small_shapes` under one tool of compute-sanitizer: 0 without a finding."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=_kernel"]
    # With PyTorch's caching allocator a read past a tensor's end would land in a neighbour and go unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "-m", "bench.gpu_sections.small_shapes"]
    return subprocess.run(
        [*command, *program], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False
    ).returncode

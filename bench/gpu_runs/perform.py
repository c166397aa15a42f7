"""One run on the card: the kit unpacked, what only takes processors begun beside, then the items in their order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu_runs.orchestrator import Orchestrator
from bench.gpu_runs.tables import LIMIT_S, RUNS, SET_UP
from bench.gpu_runs.worker import WorkerProcess

ROOT = Path(__file__).parents[2]


def perform(run: str, out: Path, conditions: Callable[[], Mapping[str, Any]], kit: Path | None) -> int:
    """Do what of `first` or `second` the folder `out` does not have yet. Exit code as of `Orchestrator.run`.

    conditions: asked once the kit's packages can be imported.
    """
    began = time.monotonic()
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    site = unpacked(kit) if kit else None
    if site:
        sys.path.append(str(site))
    environment = environment_of(site)
    log = out / f"{run}.log"
    start_worker = lambda: WorkerProcess("bench.gpu_runs.tables:TABLE", log, environment)
    left = LIMIT_S[run] - (time.monotonic() - began)
    orchestrator = Orchestrator(run, RUNS[run], out, left, start_worker, conditions())
    with log.open("a") as stream:
        beside = [
            subprocess.Popen(
                ["nice", "-n", "10", sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=stream,
                stderr=stream, start_new_session=True,
            )
            for program in SET_UP[run]
        ]  # fmt: skip
    try:
        return orchestrator.run()
    finally:
        for process in beside:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def unpacked(kit: Path) -> Path:
    """The packages of the kit's wheels in a folder of it, and its data where sections look for them.

    Not in the run's own folder: thousands of files would hide the few that are to come home.
    """
    site = kit.absolute() / "site"
    for wheel in sorted((kit / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    data = kit / "data"
    if data.is_dir() and not (ROOT / "data").exists():
        (ROOT / "data").symlink_to(data.absolute())
    return site


def environment_of(site: Path | None) -> dict[str, str]:
    """Of workers: the checkout's sources, the kit's packages, nothing from a network, memory that may grow in place."""
    search = [str(ROOT), str(ROOT / "kernels"), *([str(site)] if site else []), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
    }

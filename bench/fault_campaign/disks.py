"""Runs on small disks and on disks that cannot be written: they stop, keep what they had, and go on elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.fault_campaign.children import World, difference, fresh, record, start, words_to_go_on

MEGABYTES = (2, 8, 20, 24, 40, 45)
"""A checkpoint of the tiny run takes 18; two are kept while a third is written, and a reference model of 4."""


def disk_cases(world: World) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """`(name, case)`; each mounts a tmpfs of its own, which needs root."""
    run = fresh(world.folder / "undisturbed_disk")
    made: list[dict[str, Any]] = []

    def undisturbed() -> dict[str, Any]:
        if not made:
            if start(world.flags(run), run.with_suffix(".log")).wait():
                raise RuntimeError(f"the undisturbed run failed: {run.with_suffix('.log')}")
            made.append(record(run))
        return made[0]

    for megabytes in MEGABYTES:
        yield f"disk of {megabytes} MB", lambda size=megabytes: _full(world, size, undisturbed())
    yield "disk that is read only from the start", lambda: _read_only(world)
    yield "disk that turns read only", lambda: _turns_read_only(world, undisturbed())


def _mount(folder: Path, megabytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def _full(world: World, megabytes: int, undisturbed: dict[str, Any]) -> dict[str, Any]:
    disk = world.folder / "disk"
    _mount(disk, megabytes)
    try:
        run, log = disk / "run", world.folder / f"disk_{megabytes}.log"
        code = start(world.flags(run), log).wait()
        line = log.read_text().strip().splitlines()[-1]
        if code != 2 or not line.startswith("error: "):
            return {"code": code, "outcome": f"ended with {code}: {line[-300:]}"}
        left = sorted(path.name for path in (run / "checkpoints").glob("*")) if run.exists() else []
        _remount(disk, "size=200m")
        code = start(words_to_go_on(world, run), log).wait()
        if code:
            return {"line": line, "left": left, "outcome": f"resume ended with {code}: {log.read_text()[-300:]}"}
        return {"line": line, "left": left, "outcome": difference(run, undisturbed) or "equal"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _read_only(world: World) -> dict[str, Any]:
    disk = world.folder / "disk"
    _mount(disk, 100)
    try:
        _remount(disk, "ro")
        log = world.folder / "disk_read_only.log"
        code = start(world.flags(disk / "run"), log).wait()
        line = log.read_text().strip().splitlines()[-1]
        return {"line": line, "outcome": "refused" if code == 2 and str(disk) in line else f"{code}: {line[-300:]}"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _turns_read_only(world: World, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """After its first checkpoint. A disk with files open for writing refuses; then a full one stands in."""
    disk = world.folder / "disk"
    _mount(disk, 22 + 4)
    try:
        run, log = disk / "run", world.folder / "disk_turns.log"
        code = start(world.flags(run, phases="sft:1"), log).wait()
        if code:
            return {"outcome": f"first part ended with {code}: {log.read_text()[-300:]}"}
        _remount(disk, "ro")
        words = [f"--resume={run}", "--phases=sft:2,tempsamp:3"]
        code = start(words, log).wait()
        line = log.read_text().strip().splitlines()[-1]
        if code != 2:
            return {"line": line, "outcome": f"ended with {code}: {line[-300:]}"}
        _remount(disk, "rw,size=200m")
        code = start(words, log).wait()
        if code:
            return {"line": line, "outcome": f"resume ended with {code}: {log.read_text()[-300:]}"}
        found = record(run)
        same = found["weights"] == undisturbed["weights"]
        return {"line": line, "outcome": "equal" if same else "weights differ"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

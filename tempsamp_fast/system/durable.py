"""Folders that are there whole or not at all: written aside, hashed, synced to the disk, renamed; checked when read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.system.files import remove_any
from tempsamp_fast.system.ranks import made_by_first_rank, num_ranks, of_all_ranks, own_rank

PARTIAL = ".partial"
Digests = dict[str, tuple[int, str]]
"""`{path inside the folder: (bytes, SHA-256)}`."""


def partial_folder(final: Path) -> Path:
    """Where the content of `final` is written before it is complete."""
    return final.with_name(final.name + PARTIAL)


def seal(folder: Path) -> Digests:
    """Hash every file of a folder and sync it to the disk; called by every rank, each does its share.

    Returns the digests of all files on every rank.
    """
    names = made_by_first_rank(lambda: _files(folder))
    own = {name: _digest(folder / name) for name in _own_share(names)}
    for name in own:
        sync(folder / name)
    return {name: digest for part in of_all_ranks(own) for name, digest in part.items()}


def damage(folder: Path, digests: Digests) -> list[str]:
    """What of a sealed folder is missing or changed; called by every rank, each checks its share."""
    own = []
    for name in _own_share(sorted(digests)):
        path = folder / name
        if not path.is_file():
            own.append(f"{name} is missing")
        elif _digest(path) != tuple(digests[name]):
            own.append(f"{name} is not as it was written")
    return [line for part in of_all_ranks(own) for line in part]


def publish(final: Path) -> None:
    """Give the complete folder written aside its name, in place of an earlier one. Called by one rank."""
    partial = partial_folder(final)
    for folder in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
        sync(folder)
    if final.exists():
        remove(final)
    partial.rename(final)
    sync(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder so that a crash on the way leaves no half of it under its name."""
    doomed = folder.with_name(f"{folder.name}.old{PARTIAL}")
    remove_any(doomed)
    folder.rename(doomed)
    remove_any(doomed)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which names a folder has."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise OSError when the disk of an existing folder has no room for `num_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"{folder}: the disk is almost full: {what} takes {num_bytes / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are "
            "free; nothing was written"
        )


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum((folder / name).stat().st_size for name in _files(folder))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> tuple[int, str]:
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
            size += len(block)
    return size, found.hexdigest()


def _own_share(names: Sequence[str]) -> Sequence[str]:
    return names[own_rank() :: num_ranks()]

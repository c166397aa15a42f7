"""Folders that are there whole or not at all: written aside, hashed, synced to the disk, renamed; checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tempsamp_fast.system.files import remove_any, write_file
from tempsamp_fast.system.ranks import barrier, is_first_rank, made_by_first_rank, num_ranks, of_all_ranks, own_rank

PARTIAL = ".partial"
SEAL = "seal_{:04d}"
POLL_S, WAIT_S, PATIENCE_S = 0.05, 0.5, 60.0
Digests = dict[str, tuple[int, str]]
"""`{path inside the folder: (bytes, SHA-256)}`."""


def partial_folder(final: Path) -> Path:
    """Where the content of `final` is written before it is complete."""
    return final.with_name(final.name + PARTIAL)


class Sealing:
    """What was written aside for `final`, hashed and synced to the disk in a thread while training goes on.

    Begun by every rank when its files are written. Each rank does its share, without a collective, and leaves the
    digests in the folder; the first one takes them together and calls `complete` with those of all files. Where
    anything fails the folder is removed.
    """

    def __init__(self, final: Path, complete: Callable[[Digests], None]):
        barrier()
        self._final, self._folder, self._complete, self._error = final, partial_folder(final), complete, ""
        self._names = made_by_first_rank(lambda: _largest_first(self._folder))
        self._is_ending, self._is_void, self._started_s = False, False, time.monotonic()
        self._thread = threading.Thread(target=self._seal, name="sealing", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part has."""
        return bool(self._error)

    def wait(self) -> None:
        """Return when it is complete; called by every rank. Raises OSError with what went wrong on any, on each."""
        while True:
            self._thread.join(WAIT_S)
            states = of_all_ranks((self._error, self._thread.is_alive()))
            errors = [error for error, _ in states if error]
            self._is_void = bool(errors)
            if not any(is_alive for _, is_alive in states):
                break
        if errors:
            raise OSError(errors[0])

    def finish_alone(self) -> None:
        """Where the run is ending: others get as long for their parts as this rank took for its own, and a minute."""
        self._is_ending = True
        self._thread.join()

    def _seal(self) -> None:
        own = self._folder / SEAL.format(own_rank())
        try:
            digests = {name: _digest(self._folder / name) for name in _own_share(self._names)}
            for name in digests:
                sync(self._folder / name)
            write_file(own, json.dumps(digests))
            patience_s = PATIENCE_S + time.monotonic() - self._started_s
            if is_first_rank():
                seals = [self._folder / SEAL.format(rank) for rank in range(num_ranks())]
                self._await(lambda: all(seal.exists() for seal in seals), patience_s)
                files = {name: digest for seal in seals for name, digest in json.loads(seal.read_text()).items()}
                for seal in seals:
                    seal.unlink()
                self._complete(files)
            else:
                self._await(lambda: not self._folder.exists(), patience_s)
        except Exception as error:  # told by `wait`
            if not isinstance(error, _GivenUpError):
                self._error = f"{self._final}: not written: {(str(error) or repr(error)).splitlines()[0]}"
            if is_first_rank():
                shutil.rmtree(self._folder, ignore_errors=True)

    def _await(self, is_done: Callable[[], bool], patience_s: float) -> None:
        since_s = time.monotonic()
        while not is_done():
            if self._is_void or (self._is_ending and time.monotonic() - since_s > patience_s):
                raise _GivenUpError
            time.sleep(POLL_S)


class _GivenUpError(Exception):
    """Other ranks' parts are not waited for any more."""


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


def _largest_first(folder: Path) -> list[str]:
    """So that shares of every n-th are of like size."""
    return sorted(_files(folder), key=lambda name: -(folder / name).stat().st_size)


def _digest(path: Path) -> tuple[int, str]:
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
            size += len(block)
    return size, found.hexdigest()


def _own_share(names: Sequence[str]) -> Sequence[str]:
    return names[own_rank() :: num_ranks()]

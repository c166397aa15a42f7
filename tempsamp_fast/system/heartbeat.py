"""No silent hang: every rank tells what it does, and a rank that dies or stalls ends the run with its name."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempsamp_fast.system.files import one_line, own_folder, write_file
from tempsamp_fast.system.ranks import max_over_ranks, of_all_ranks

logger = logging.getLogger(__name__)

RECORD_BYTES = 512
INTERVAL_S = 2.0
LOST_RANK_EXIT = 3
FINISHED = "finished"
ENDED = "ended as "


class RankLostError(RuntimeError):
    """Another rank died, failed or stalled; the message names it and what it did last."""


@dataclass
class _Seen:
    """The last record of a rank, and when (monotonic seconds) its beat and its count of actions last changed."""

    record: dict[str, Any]
    beat_s: float
    action_s: float


class Heartbeat:
    """Writes this rank's last action to RUN/heartbeat/rank_0000.json and watches those of the others, in a thread.

    A context manager around the training loop, entered and left by every rank. A rank is lost when its process on
    this host is gone, when its record says that it failed, or when its record has not changed for `timeout_s` (killed
    on another host, stopped). When no rank has begun anything new for `timeout_s`, those that are furthest behind are
    taken for the ones that stall. The run then ends: one line on stderr and in RUN/error.log, exit code 3.

    The first rank of each host watches all; the others watch those of their host, and take over its verdict.

    before_exit: called when the run ends so, before this process does.
    """

    def __init__(
        self, run: Path, rank: int, world_size: int, timeout_s: float, before_exit: Callable[[], None] = lambda: None
    ):
        self._before_exit = before_exit
        self.run, self.rank, self.world_size, self.timeout_s = run, rank, world_size, timeout_s
        self.interval_s = min(INTERVAL_S, timeout_s / 4)
        self._action, self._count, self._beat = "starting", 0, 0
        self._stop = threading.Event()
        self._seen: dict[int, _Seen] = {}
        self._watched = list(range(world_size))

    def at(self, action: str) -> None:
        """This rank begins something."""
        self._action, self._count = action, self._count + 1

    def __enter__(self) -> Heartbeat:
        own_folder(self.run / "heartbeat")
        self._path(self.rank).unlink(missing_ok=True)
        self._file = os.open(self._path(self.rank), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._write()
        self._watched = watched_by(self.rank, of_all_ranks(_place()))
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Raises RankLostError in place of an error that is only the echo of another rank's end."""
        lost = self._await_verdict() if isinstance(error, (RuntimeError, OSError)) and self.world_size > 1 else None
        self._stop.set()
        self._thread.join()
        failed = f"failed: {' '.join(str(error).split())}"[:200]
        self.at(ENDED + lost if lost else FINISHED if error is None else failed)
        self._write()
        os.close(self._file)
        if lost:
            raise RankLostError(lost) from error

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                self._write()
            except OSError as error:
                logger.warning("%s: the heartbeat was not written: %s", self._path(self.rank), error)
            if lost := self.lost():
                self.at(ENDED + lost)
                with suppress(OSError):
                    self._write()
                self._end(lost)

    def _await_verdict(self) -> str | None:
        deadline = time.monotonic() + 2 * self.interval_s
        while (lost := self.lost()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return lost

    def _end(self, lost: str) -> None:
        """A thread can only end a process that hangs in a collective by leaving at once."""
        if self._stop.is_set():
            return
        sys.stderr.write(f"error: {one_line(lost)}\n")
        sys.stderr.flush()
        try:
            write_file(self.run / "error.log", lost + "\n")
            self._before_exit()
        finally:
            os._exit(LOST_RANK_EXIT)

    def lost(self) -> str | None:
        """Who is lost and what it did last; None while all goes on."""
        now = time.monotonic()
        for rank in self._watched:
            record = self._read(rank)
            seen = self._seen.setdefault(rank, _Seen(record, now, now))
            if record["beat"] != seen.record["beat"]:
                seen.beat_s = now
            if record["count"] != seen.record["count"]:
                seen.action_s = now
            seen.record = record
        for rank, seen in self._seen.items():
            if rank == self.rank or seen.record["action"] == FINISHED:
                continue
            if seen.record["action"].startswith(ENDED):
                return seen.record["action"].removeprefix(ENDED)
            if seen.record["action"].startswith("failed: "):
                return f"{_name(rank, seen)} {seen.record['action']}"
            if _is_gone(seen.record):
                return f"{_name(rank, seen)} died; its last action: {seen.record['action']}"
            silent_s = now - seen.beat_s
            if silent_s > self.timeout_s:
                return f"{_name(rank, seen)} is silent for {silent_s:.0f} s; its last action: {seen.record['action']}"
        is_first = len(self._watched) == self.world_size
        if is_first and all(now - seen.action_s > self.timeout_s for seen in self._seen.values()):
            behind = min(seen.record["count"] for seen in self._seen.values())
            stalled = [(rank, seen) for rank, seen in self._seen.items() if seen.record["count"] == behind]
            names = ", ".join(f"{_name(rank, seen)} ({seen.record['action']})" for rank, seen in stalled)
            return f"nothing new for {self.timeout_s:.0f} s; furthest behind: {names}"
        return None

    def _path(self, rank: int) -> Path:
        return self.run / "heartbeat" / f"rank_{rank:04d}.json"

    def _write(self) -> None:
        """In place and always of one length: it needs no room on a full disk."""
        self._beat += 1
        record = {"place": _place(), "pid": os.getpid(), "beat": self._beat, "count": self._count}
        action = self._action
        while len(text := json.dumps({**record, "action": action})) > RECORD_BYTES:
            action = action[:-16]
        os.pwrite(self._file, text.ljust(RECORD_BYTES).encode(), 0)

    def _read(self, rank: int) -> dict[str, Any]:
        """The rank's record, or the last one that could be read."""
        try:
            return json.loads(self._path(rank).read_text())
        except (OSError, ValueError):
            seen = self._seen.get(rank)
            return seen.record if seen else {"place": "", "pid": 0, "beat": 0, "count": 0, "action": "starting"}


RELAY_S = 0.5
"""Within it a launcher passes on to its ranks the Ctrl-C that they got from the terminal already."""


class GracefulStop:
    """SIGTERM, Ctrl-C or a lost terminal asks for a checkpoint and the end after the step; `grace_s` later it ends so.

    A context manager around the training loop. A second Ctrl-C ends at once, a second SIGTERM changes nothing, and
    under `nohup` a lost terminal does not.

    how_to_go_on: what is said last. before_exit: called when the grace is over, before the process ends.
    """

    def __init__(self, grace_s: float, how_to_go_on: str = "", before_exit: Callable[[], None] = lambda: None):
        self.grace_s, self.how_to_go_on = grace_s, how_to_go_on
        self._before_exit, self._is_patient = before_exit, False
        self.asked = False
        self._asked_s = 0.0
        self._timer: threading.Timer | None = None

    def agreed(self, device: Any) -> bool:
        """Whether any rank was asked to stop; every rank calls it after the same step and gets the same answer."""
        is_stopping = bool(max_over_ranks(int(self.asked), device))
        if is_stopping and self._timer:
            self._timer.cancel()  # the checkpoint takes the time it takes
        return is_stopping

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Around what takes the time that it takes: the grace begins anew after it."""
        self._is_patient = True
        try:
            yield
        finally:
            self._is_patient = False

    def __enter__(self) -> GracefulStop:
        numbers = [signal.SIGTERM, signal.SIGINT]
        numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        self._previous = [(number, signal.signal(number, self._ask)) for number in numbers]
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer:
            self._timer.cancel()
        for number, previous in self._previous:
            signal.signal(number, previous)

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _forget_terminal()
        if self.asked:
            if number == signal.SIGINT and time.monotonic() - self._asked_s > RELAY_S:
                self._end("Ctrl-C again", number)
            return
        self.asked, self._asked_s = True, time.monotonic()
        name = signal.Signals(number).name
        # A handler may have interrupted a write to stderr: this one goes past its buffer.
        if os.environ.get("RANK", "0") == "0":
            os.write(2, f"\n{name}: stopping after this step; Ctrl-C (again) ends at once\n".encode())
        self._begin_grace(number)

    def _begin_grace(self, number: int) -> None:
        self._timer = threading.Timer(self.grace_s, self._end_grace, (number,))
        self._timer.daemon = True
        self._timer.start()

    def _end_grace(self, number: int) -> None:
        if self._is_patient:
            self._begin_grace(number)
            return
        self._before_exit()
        name = signal.Signals(number).name
        self._end(f"{name}, and the step did not end within {self.grace_s:.0f} s", number)

    def _end(self, reason: str, number: int) -> None:
        os.write(2, f"error: {reason}; nothing saved since the last checkpoint; {self.how_to_go_on}\n".encode())
        os._exit(128 + number)


def _forget_terminal() -> None:
    """What is written to one that is gone fails, and would end the run before it is saved."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nothing, output)
    os.close(nothing)


def watched_by(rank: int, places: Sequence[str]) -> list[int]:
    """All ranks by the first one of each place, those of its place by every other one. places: by rank."""
    here = [each for each, place in enumerate(places) if place == places[rank]]
    return list(range(len(places))) if rank == here[0] else here


def _place() -> str:
    """The host and its process namespace: where a process id means something."""
    return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"


def _is_gone(record: dict[str, Any]) -> bool:
    if record["place"] != _place():
        return False
    try:
        state = Path(f"/proc/{record['pid']}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def _name(rank: int, seen: _Seen) -> str:
    host = seen.record["place"].split(" ")[0]
    return f"rank {rank} (pid {seen.record['pid']} on {host})"

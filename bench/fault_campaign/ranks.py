"""Two ranks, one of which is killed, stopped, slowed or asked to end; the other must not wait for ever."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from bench.fault_campaign.children import Child, World, difference, fresh, record, start
from tempsamp_fast.system.device import free_port

SETTINGS = {"stall_timeout_s": 8, "on_bad_sample": "raise"}
WAIT_FOR = {"rollout": "tempsamp/answer", "first steps": "sft/answer"}
"""Moments, by what metrics.jsonl holds then."""


def rank_cases(world: World) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """`(name, case)`, for ranks with rows of their own and for ranks that share each row."""
    for together in (1, 2):
        ranks, suffix = _Ranks(world, together), ", rows shared" if together > 1 else ""
        for rank in (0, 1):
            for moment in WAIT_FOR:
                for number in (signal.SIGKILL, signal.SIGSTOP):
                    name = f"rank {rank} gets {number.name} during {moment}{suffix}"
                    yield name, partial(ranks.lost, rank, number, moment)
            yield f"rank {rank} is slow{suffix}", partial(ranks.slow, rank)
            yield f"rank {rank} gets SIGTERM{suffix}", partial(ranks.asked_to_end, rank)


class _Ranks:
    def __init__(self, world: World, together: int) -> None:
        self._world, self._together = world, together

    @cached_property
    def _undisturbed(self) -> dict[str, Any]:
        run = fresh(self._folder("undisturbed_ranks"))
        codes = [child.wait() for child in self._start(run)]
        if any(codes):
            raise RuntimeError(f"the undisturbed run of two ranks ended with {codes}")
        return record(run)

    def _folder(self, name: str) -> Path:
        return self._world.folder / f"{name}_{self._together}"

    def _start(self, run: Path, resume: bool = False) -> list[Child]:
        port, settings = free_port(), {**SETTINGS, "sequence_parallel_size": self._together}
        words = [f"--resume={run}"] if resume else self._world.flags(run, **settings)
        return [
            start(words, run.with_name(f"{run.name}_rank{rank}.log"), rank=rank, world_size=2, port=port)
            for rank in (0, 1)
        ]

    def _go_on(self, run: Path, expected: dict[str, Any]) -> str:
        codes = [child.wait() for child in self._start(run, resume=True)]
        return f"resume ended with {codes}" if any(codes) else difference(run, expected)

    def lost(self, rank: int, number: signal.Signals, moment: str) -> dict[str, Any]:
        expected = self._undisturbed
        run = fresh(self._folder(f"lost_{rank}_{number.name}_{moment.replace(' ', '_')}"))
        children = self._start(run)
        _wait_until(run, WAIT_FOR[moment], children)
        hit_s = time.monotonic()
        children[rank].signal(number)
        other = children[1 - rank]
        code = other.wait()
        took_s = time.monotonic() - hit_s
        if number == signal.SIGSTOP:
            children[rank].signal(signal.SIGKILL)
            children[rank].signal(signal.SIGCONT)
        children[rank].wait()
        lines = [line for line in other.log.read_text().splitlines() if line.startswith("error: ")]
        line = lines[-1] if lines else other.log.read_text()[-300:]
        facts = {"line": line, "took_s": round(took_s, 1)}
        if code != 3 or f"rank {rank} " not in line:
            return {**facts, "outcome": f"the other rank ended with {code}"}
        return {**facts, "outcome": self._go_on(run, expected) or "ended by name"}

    def slow(self, rank: int) -> dict[str, Any]:
        """Stopped nine tenths of the time, which is far from `stall_timeout_s`."""
        expected = self._undisturbed
        run = fresh(self._folder(f"slow_{rank}"))
        children = self._start(run)
        _wait_until(run, WAIT_FOR["first steps"], children)
        for _ in range(12):
            children[rank].signal(signal.SIGSTOP)
            time.sleep(0.45)
            children[rank].signal(signal.SIGCONT)
            time.sleep(0.05)
        codes = [child.wait() for child in children]
        if any(codes):
            return {"outcome": f"ended with {codes}: {children[1 - rank].log.read_text()[-300:]}"}
        return {"outcome": difference(run, expected) or "survived"}

    def asked_to_end(self, rank: int) -> dict[str, Any]:
        expected = self._undisturbed
        run = fresh(self._folder(f"sigterm_{rank}"))
        children = self._start(run)
        _wait_until(run, WAIT_FOR["first steps"], children)
        children[rank].signal(signal.SIGTERM)
        codes = [child.wait() for child in children]
        if any(codes):
            return {"outcome": f"ended with {codes}: {children[rank].log.read_text()[-300:]}"}
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        return {"left": left, "outcome": self._go_on(run, expected) or "equal"}


def _wait_until(run: Path, text: str, children: list[Child]) -> None:
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and text in metrics.read_text()):
        if time.monotonic() > deadline:
            for child in children:
                child.signal(signal.SIGKILL)
            raise TimeoutError(f"{run} did not come to {text}")
        time.sleep(0.05)

"""Mutants met by tests that are loaded already: each in a fork of one pytest process, which takes it in place."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.mutation.mutant import Mutant
from bench.mutation.reach import Reach, not_meeting
from bench.mutation.swap import swap

TIMEOUT_S = 600.0
COSTS_S = {"rank_server": 10.0, "finished_run": 2.0, "trainer": 0.6, "stepper": 0.6}
"""What the first use of a fixture takes; every fork makes its own."""
OF_RUNS = ("run", "learning")
"""Packages that little but a run meets."""
FAR = ("kernels", "video", "faults", "report", "planning", "embedded")
"""Folders of tests that meet little of the other packages."""


class Warm:
    """A pytest plugin under which no test runs by itself: each mutant meets the collected ones, near and cheap first.

    killers: tests that noticed mutants before, by their names; they come first. reach: what is recorded of tests, not
    necessarily of all; those that do not run a mutant's statement are left out. budget_s: of tests that a mutant meets.
    note: takes a mutant, the first test that failed ("" for none) and seconds.
    A failure counts where the test passes without the mutant, in another fork.
    """

    def __init__(
        self,
        root: Path,
        mutants: Sequence[Mutant],
        killers: Mapping[str, str],
        reach: Reach,
        budget_s: float,
        note: Callable[[Mutant, str, float], None],
    ) -> None:
        self._root, self._mutants, self._killers, self._budget_s, self._note = root, mutants, killers, budget_s, note
        self._reach = reach
        self._passes: dict[str, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for mutant in self._mutants:
            started = time.monotonic()
            killer = [item for item in session.items if item.nodeid == self._killers.get(mutant.name)]
            without = not_meeting(self._root, self._reach, mutant)
            meeting = [item for item in session.items if item.nodeid not in without]
            test = self._in_a_fork([*killer, *nearest(meeting, mutant.file)], mutant)
            if test and test not in self._passes:
                alone = [item for item in session.items if item.nodeid == test]
                self._passes[test] = bool(alone) and not self._in_a_fork(alone, None)
            self._note(mutant, test if self._passes.get(test) else "", time.monotonic() - started)
        return True

    def _in_a_fork(self, items: Sequence[pytest.Item], mutant: Mutant | None) -> str:
        """The first test that fails, "" where none does."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.setsid()
                os.close(reader)
                self._run(items, mutant, lambda test: (os.write(writer, test.encode()), os._exit(0)))
            os._exit(0)
        os.close(writer)
        answered, _, _ = select.select([reader], [], [], TIMEOUT_S)
        test = os.read(reader, 1 << 14).decode() if answered else ""
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return test

    def _run(self, items: Sequence[pytest.Item], mutant: Mutant | None, failed: Callable[[str], Any]) -> None:
        class FirstFailure:
            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.failed:
                    failed(report.nodeid)

        if not items:
            return
        items[0].config.pluginmanager.register(FirstFailure())
        if mutant is not None:
            try:
                if not put(self._root, mutant):
                    return
            except Exception:
                traceback.print_exc()
                return
        start = sum(os.times()[:4])
        for index, item in enumerate(items):
            if sum(os.times()[:4]) - start > self._budget_s:
                return
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=(*items, None)[index + 1])


def put(root: Path, mutant: Mutant) -> bool:
    """Put a mutant into what is loaded of its file; False where it is not loaded or not to be put in place."""
    file = (root / mutant.file).resolve()
    is_loaded = lambda module: Path(getattr(module, "__file__", None) or "/").resolve() == file
    module = next(filter(is_loaded, list(sys.modules.values())), None)
    return module is not None and swap(module, mutant.apply(root))


def nearest(items: Sequence[pytest.Item], file: str) -> list[pytest.Item]:
    """Tests in the order in which they meet a mutant of `file`: by what they need and how far they are from it.

    Variants of one test come after one another's first.
    """
    seen: Counter[str] = Counter()
    costs = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        fixture_s = max((COSTS_S.get(each, 0.0) for each in getattr(item, "fixturenames", ())), default=0.0)
        away = distance(name.partition("::")[0], file)
        if package_of(file) in OF_RUNS and away > 0.3:
            away = min(away, 1.0) if fixture_s else 6 * away
        costs.append((0.1 + fixture_s) * away * (1 + seen[name] / 3))
        seen[name] += 1
    return [items[index] for index in sorted(range(len(items)), key=costs.__getitem__)]


def distance(test_file: str, file: str) -> float:
    """From .1 for the test file of a module to 25 for what hardly ever meets it."""
    test, source, package = Path(test_file), Path(file), package_of(file)
    if test.stem == f"test_{source.stem}":
        return 0.1
    if test.parts[1] == package or (not package and test.parts[1] in ("rewards", "evaluation", "run")):
        return 0.3 if source.stem in test.stem else 1.0
    return 2.0 if test.parts[1] == "config" else 25.0 if test.parts[1] in FAR else 5.0


def package_of(file: str) -> str:
    parts = Path(file).parts
    return "kernels" if parts[0] == "kernels" else parts[1] if len(parts) > 2 else ""

"""Which test runs which lines of the package, recorded once, and so which tests can notice a mutant."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.mutation.mutant import Mutant
from bench.mutation.recording.recorder import Line, Recorder

RECORDING = Path(__file__).with_name("recording")
PACKAGES = ("tempsamp_fast", "kernels")
Reach = dict[str, dict[str, Any]]
"""By test file: `inputs` (digests by file) and `tests`: by node id `seconds` of CPU, `passed`, `lines` by source."""


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


class Recording:
    """A pytest plugin that writes, of one test file, what `Reach` holds of it.

    What fixtures of a wider scope run counts for every test that asks for them, and what child processes run for every
    test from the first one that started any.
    """

    def __init__(self, tree: Path, out: Path) -> None:
        self._tree, self._out = tree, out
        self._roots = tuple(f"{tree / package}{os.sep}" for package in PACKAGES)
        self._recorder = Recorder(self._roots, set())
        self._fixtures: dict[str, set[Line]] = {}
        self._asked: dict[str, list[str]] = {}
        self._tests: dict[str, tuple[float, set[Line]]] = {}
        self._failed: set[str] = set()
        self._children = out.with_suffix(".children")
        self._starting: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        record = {"MUTATION_LINES": str(self._children), "MUTATION_ROOTS": os.pathsep.join(self._roots)}
        os.environ |= record
        os.environ["PYTHONPATH"] = f"{RECORDING}{os.pathsep}{os.environ['PYTHONPATH']}"
        plain = subprocess.Popen.__init__

        def recorded(popen: Any, *arguments: Any, env: Any = None, **options: Any) -> None:
            if env is not None:
                inherited = [folder for folder in (str(RECORDING), env.get("PYTHONPATH")) if folder]
                env = {**env, **record, "PYTHONPATH": os.pathsep.join(inherited)}
            plain(popen, *arguments, env=env, **options)

        subprocess.Popen.__init__ = recorded  # type: ignore[method-assign]
        self._recorder.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Iterator[None]:
        outer = self._recorder.seen
        if fixturedef.scope != "function":
            self._recorder.seen = self._fixtures.setdefault(fixturedef.argname, set())
        yield
        self._recorder.seen = outer

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        self._recorder.seen, start = set(), os.times()
        yield
        spent = sum(os.times()[:4]) - sum(start[:4])  # of this process and of children that have ended
        self._tests[item.nodeid] = spent, self._recorder.seen
        self._asked[item.nodeid] = getattr(item, "fixturenames", [])
        if self._starting or self._children.exists():
            self._starting.append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        children = self._children.read_text().split("\n") if self._children.exists() else []
        started = {(file, int(number)) for file, _, number in (line.rpartition(":") for line in children) if number}
        tests = {}
        for name, (seconds, own) in self._tests.items():
            lines = own.union(*(self._fixtures.get(fixture, set()) for fixture in self._asked[name]))
            by_file: dict[str, list[int]] = {}
            for file, number in sorted(lines | (started if name in self._starting else set())):
                by_file.setdefault(str(Path(file).relative_to(self._tree)), []).append(number)
            tests[name] = {"seconds": round(seconds, 3), "passed": name not in self._failed, "lines": by_file}
        self._out.write_text(json.dumps(tests))


def inputs_of(root: Path, test_file: str, tests: dict[str, Any]) -> dict[str, str]:
    """Digests of what the record of a test file rests on: it, what is beside it, and the sources that it runs."""
    folder = (root / test_file).parent
    shared = [*(root / "tests").glob("*.py"), *folder.rglob("*.py")]
    beside = [path for path in shared if not path.name.startswith("test_")]
    sources = {source for test in tests.values() for source in test["lines"]}
    names = {test_file, "conftest.py", *sources}
    names |= {str(path.relative_to(root)) for path in beside}
    return {name: digest(root / name) for name in sorted(names)}


def stale(root: Path, reach: Reach, test_file: str) -> bool:
    """Whether a test file has to be recorded (again)."""
    inputs = reach.get(test_file, {}).get("inputs", {"": "none"})
    return any(digest(root / name) != found for name, found in inputs.items())


def tests_reaching(root: Path, reach: Reach, mutant: Mutant) -> list[tuple[str, list[str], float]]:
    """(test file, node ids, seconds) that run the mutant's statement, near and cheap ones first.

    Of a statement that runs at import: those that run anything of its file, or of a file that imports from it.
    """
    lines, at_import = mutant.lines(root)
    files = {mutant.file}
    if at_import:
        module = Path(mutant.file).stem
        for package in PACKAGES:
            sources = (root / package).rglob("*.py")
            files |= {str(path.relative_to(root)) for path in sources if f".{module} import" in path.read_text()}
    found = []
    for test_file, entry in reach.items():
        chosen = {
            name: test["seconds"]
            for name, test in entry["tests"].items()
            if test["passed"] and (files & test["lines"].keys() if at_import else _runs(test, mutant.file, lines))
        }
        if chosen:
            found.append((test_file, sorted(chosen, key=lambda name: chosen[name]), sum(chosen.values())))
    return sorted(found, key=lambda each: each[2] * (0.2 if _is_near(each[0], mutant.file) else 1.0))


def not_meeting(root: Path, reach: Reach, mutant: Mutant) -> set[str]:
    """Recorded tests that do not pass or do not run the mutant's statement, where it and they are as recorded."""
    known = {
        test_file: entry
        for test_file, entry in reach.items()
        if all(entry["inputs"].get(name) in (None, digest(root / name)) for name in (mutant.file, test_file))
    }
    reaching = {name for _, names, _ in tests_reaching(root, known, mutant) for name in names}
    return {name for entry in known.values() for name in entry["tests"]} - reaching


def _runs(test: dict[str, Any], file: str, lines: range) -> bool:
    return any(number in lines for number in test["lines"].get(file, ()))


def _is_near(test_file: str, file: str) -> bool:
    """Whether the test file is named after the module."""
    return Path(test_file).stem == f"test_{Path(file).stem}"

"""The pytest plugin of a mutant's run: the chosen tests in the chosen order, and the first that fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest


class FirstFailure:
    """Writes the node id of the first failure to `out`, "" where there is none."""

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._out = out

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self._places), key=lambda item: self._places[item.nodeid]
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._note(report.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._note(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self._note("")

    def _note(self, name: str) -> None:
        if not self._out.exists():
            self._out.write_text(json.dumps(name))

"""Seconds of the parts of a step, by a clock that is set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tempsamp_fast.system import stopwatch
from tempsamp_fast.system.stopwatch import Stopwatch


def test_a_lap_counts_from_the_last_one_and_laps_of_one_name_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a new step begins with none."""
    clock = iter([0.0, 1.0, 3.0, 7.0, 100.0, 102.0])
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch = Stopwatch()
    for name in ("rollout", "update", "rollout"):
        watch.lap(name)
    assert watch.total() == {"time/rollout_s": 5.0, "time/update_s": 2.0, "time/step_s": 7.0}
    watch.restart()
    watch.lap("update")
    assert watch.total() == {"time/update_s": 2.0, "time/step_s": 2.0}

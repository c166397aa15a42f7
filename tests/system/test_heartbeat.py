"""Which rank a heartbeat takes for lost by what the ranks have written, and how a process ends that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.system import heartbeat
from tempsamp_fast.system.heartbeat import LOST_RANK_EXIT, GracefulStop, Heartbeat, RankLostError, watched_by

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 100.0


class Ranks:
    """Records of three ranks as this process would write them, a clock to be set, and rank 0's heartbeat."""

    def __init__(self, run: Path) -> None:
        self.now = 0.0
        self.run = run
        (run / "heartbeat").mkdir(parents=True)
        self.heart = Heartbeat(run, rank=0, world_size=3, timeout_s=TIMEOUT_S)

    def write(self, rank: int, **changed: Any) -> None:
        record = {"place": heartbeat._place(), "pid": os.getpid(), "beat": 1, "count": 1, "action": "evaluation"}
        (self.run / f"heartbeat/rank_{rank:04d}.json").write_text(json.dumps(record | changed))

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def after(self, seconds: float) -> str | None:
        """The verdict so much later."""
        self.sleep(seconds)
        return self.heart.lost()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks(tmp_path)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: ranks.now)
    monkeypatch.setattr(heartbeat.time, "sleep", ranks.sleep)
    monkeypatch.setattr(heartbeat, "of_all_ranks", lambda own: [own] * 3)
    for rank in range(3):
        ranks.write(rank)
    assert ranks.after(0) is None
    return ranks


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_rank_whose_process_is_gone_died(ranks: Ranks) -> None:
    gone = dead_process()
    ranks.write(2, pid=gone, action="rollout of step 7")
    verdict = ranks.after(1)
    assert verdict is not None
    assert f"rank 2 (pid {gone} on " in verdict and verdict.endswith("died; its last action: rollout of step 7")


def test_a_rank_whose_process_ended_and_was_not_waited_for_died(ranks: Ranks) -> None:
    """As a zombie it stays in the table of processes until its launcher looks."""
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    ranks.write(2, pid=process.pid)
    verdict = ranks.after(1)
    process.wait()
    assert verdict is not None and verdict.startswith(f"rank 2 (pid {process.pid} on ")


def test_a_process_id_of_another_host_says_nothing(ranks: Ranks) -> None:
    ranks.write(2, pid=dead_process(), place="elsewhere pid:[1]")
    assert ranks.after(1) is None


def test_a_rank_that_failed_or_finished_says_so_itself(ranks: Ranks) -> None:
    ranks.write(1, pid=dead_process(), action="finished")
    assert ranks.after(1) is None
    ranks.write(2, action="failed: no room")
    verdict = ranks.after(1)
    assert verdict is not None and verdict.startswith("rank 2 ") and verdict.endswith("failed: no room")


def test_a_rank_without_a_new_beat_is_silent(ranks: Ranks) -> None:
    for beat in (2, 3):
        ranks.write(1, beat=beat, count=beat)
        assert ranks.after(TIMEOUT_S / 2) is None
    ranks.write(1, beat=4, count=4)
    verdict = ranks.after(1)
    assert verdict is not None and verdict.startswith("rank 2 ") and "is silent for 101 s" in verdict


def test_where_nobody_begins_anything_those_furthest_behind_are_named(ranks: Ranks) -> None:
    for rank, count, action in ((0, 9, "update of step 4"), (1, 8, "rollout of step 4"), (2, 9, "update of step 4")):
        ranks.write(rank, beat=2, count=count, action=action)
    assert ranks.after(1) is None
    for rank, count, action in ((0, 9, "update of step 4"), (1, 8, "rollout of step 4"), (2, 9, "update of step 4")):
        ranks.write(rank, beat=3, count=count, action=action)
    verdict = ranks.after(TIMEOUT_S + 1)
    assert verdict is not None and verdict.startswith("nothing new for 100 s; furthest behind: rank 1 ")
    assert verdict.endswith("(rollout of step 4)") and "rank 2" not in verdict


def test_the_first_rank_of_a_host_watches_all_and_the_others_their_host() -> None:
    """64 ranks of 8 hosts read 8 x 64 + 56 x 8 records in a round, and not 64 x 64."""
    places = [f"node-{rank // 8}" for rank in range(64)]
    watched = [watched_by(rank, places) for rank in range(64)]
    assert [rank for rank, of in enumerate(watched) if len(of) == 64] == list(range(0, 64, 8))
    assert watched[13] == list(range(8, 16)) and sum(map(len, watched)) == 8 * 64 + 56 * 8


def test_a_rank_takes_over_the_verdict_of_the_first_of_its_host(ranks: Ranks) -> None:
    """Its own look at what stalls would not know of other hosts."""
    ranks.heart._watched = [0, 1]
    ranks.heart._seen.clear()
    assert ranks.after(1) is None
    for _ in range(4):
        for rank in (0, 1):
            ranks.write(rank, beat=ranks.now, count=1)
        assert ranks.after(TIMEOUT_S / 2) is None
    ranks.write(1, pid=dead_process(), action="ended as rank 2 (pid 7 on elsewhere) died; its last action: evaluation")
    assert ranks.after(1) == "rank 2 (pid 7 on elsewhere) died; its last action: evaluation"


def test_a_collective_that_breaks_gives_way_to_the_rank_that_broke_it(ranks: Ranks) -> None:
    """And the error of one rank alone stays what it is."""
    with pytest.raises(RankLostError, match=r"rank 2 .* died; its last action: evaluation"), ranks.heart:
        ranks.write(2, pid=dead_process())
        raise RuntimeError("Connection closed by peer")
    left = json.loads((ranks.run / "heartbeat/rank_0000.json").read_text())["action"]
    assert left.startswith("ended as rank 2 ") and "Connection" not in left
    with pytest.raises(RuntimeError, match="own fault"), Heartbeat(ranks.run / "alone", 0, 1, TIMEOUT_S):
        raise RuntimeError("own fault")


def test_a_beat_that_cannot_be_written_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons, pwrite = iter(["input/output error"]), os.pwrite

    def failing_once(*arguments: Any) -> int:
        for reason in reasons:
            raise OSError(reason)
        return pwrite(*arguments)

    def last_beat() -> int:
        return json.loads((tmp_path / "heartbeat/rank_0000.json").read_text())["beat"]

    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.01)
    with Heartbeat(tmp_path, 0, 1, TIMEOUT_S):
        monkeypatch.setattr(os, "pwrite", failing_once)
        wait_for(lambda: "was not written: input/output error" in caplog.text)
        beat = last_beat()
        wait_for(lambda: last_beat() > beat)


@pytest.mark.parametrize("action", ["evaluation of 5000 queries", "a long story " * 50])
def test_a_short_record_leaves_nothing_of_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """They are written in place, all of one length."""
    file = tmp_path / "heartbeat/rank_0000.json"
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.01)
    with Heartbeat(tmp_path, 0, 1, TIMEOUT_S) as heart:
        heart.at(action)
        wait_for(lambda: action[:12] in file.read_text())
        assert file.stat().st_size == heartbeat.RECORD_BYTES
        heart.at("end")
        wait_for(lambda: '"end"' in file.read_text())
        assert json.loads(file.read_text())["action"] == "end"


@pytest.mark.parametrize(("error", "left"), [(None, "finished"), (ValueError("no\n room"), "failed: no room")])
def test_a_rank_leaves_behind_how_it_ended(tmp_path: Path, error: Exception | None, left: str) -> None:
    """For the others to read."""
    with suppress(ValueError), Heartbeat(tmp_path, 0, 1, TIMEOUT_S):
        if error:
            raise error
    assert json.loads((tmp_path / "heartbeat/rank_0000.json").read_text())["action"] == left


@pytest.mark.parametrize(("timeout_s", "interval_s"), [(600.0, 2.0), (4.0, 1.0)])
def test_ranks_look_every_two_seconds_and_four_times_within_a_short_timeout(
    tmp_path: Path, timeout_s: float, interval_s: float
) -> None:
    assert Heartbeat(tmp_path, 0, 1, timeout_s).interval_s == interval_s


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(program: str, *words: str) -> tuple[int, str]:
    """Exit code and stderr of a program that would hang for ten minutes; it is waited for for one."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("has_agreed", [True, False], ids=["after the step", "after the loop"])
def test_what_comes_after_the_step_takes_the_time_it_takes(monkeypatch: pytest.MonkeyPatch, has_agreed: bool) -> None:
    """The grace is for the step alone: not for the checkpoint, nor for what follows the loop."""
    codes: list[int] = []

    def wait_for_the_end_of_the_grace() -> None:
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer) and timer.interval == 1.5:
                timer.join()

    monkeypatch.setattr(os, "_exit", codes.append)
    with GracefulStop(1.5) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        if has_agreed:
            assert stop.agreed("cpu")
            wait_for_the_end_of_the_grace()
            assert codes == []
    wait_for_the_end_of_the_grace()
    assert codes == []


HANGS_IN_A_STEP = """
import os, signal, time
from tempsamp_fast.system.heartbeat import GracefulStop
with GracefulStop(grace_s=1, before_exit=lambda: os.write(2, b"sealed\\n")) as stop:
    with stop.patience():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        os.write(2, b"patient\\n")
    time.sleep(600)
"""
WAITS_FOR_A_RANK = """
import sys, time
from pathlib import Path
from tempsamp_fast.system import heartbeat
heartbeat.of_all_ranks = lambda own: [own] * 3
with heartbeat.Heartbeat(Path(sys.argv[1]), 0, 3, timeout_s=100):
    time.sleep(600)
"""


def test_a_step_that_does_not_end_after_sigterm_ends_with_the_grace() -> None:
    """What takes its time is left it, and what is under way comes to its end first."""
    code, stderr = ended(HANGS_IN_A_STEP)
    assert code == 128 + signal.SIGTERM and "did not end within 1 s" in stderr
    assert "patient\nsealed\nerror: SIGTERM" in stderr


def test_a_process_that_waits_for_a_lost_rank_ends_by_its_name(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.write(1)
    ranks.write(2, action="failed: no room")
    code, stderr = ended(WAITS_FOR_A_RANK, str(tmp_path))
    assert code == LOST_RANK_EXIT and "error: rank 2 " in stderr and "failed: no room" in stderr
    assert "rank 2 " in (tmp_path / "error.log").read_text()

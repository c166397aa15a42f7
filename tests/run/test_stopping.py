"""Ctrl-C is SIGTERM: the step is finished, the run saved, and said how to go on; a second one ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.system import heartbeat
from tempsamp_fast.system.heartbeat import GracefulStop
from tempsamp_fast.train import main

REPOSITORY = Path(__file__).parents[2]


def test_ctrl_c_saves_after_the_step_and_says_how_to_go_on(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, capfd
) -> None:
    """A launcher passes on to its ranks what they got from the terminal already: that is no second Ctrl-C."""
    folder, update = tmp_path / "run", Run.update

    def interrupted(run: Run, at: Any, groups: Any) -> Any:
        if at.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, at, groups)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", interrupted)
        trainer.main(folder, "--phases", "sft:4")
    assert latest_checkpoint(folder)[1] == 2 and signal.getsignal(signal.SIGINT) is handler
    assert (
        f"go on with --resume {folder}" in caplog.text and "SIGINT: stopping after this step" in capfd.readouterr().err
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["--resume", str(folder)])
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert "at step 2" in caplog.text


INTERRUPTED_TWICE = """
import os, signal, time
from tempsamp_fast.system.heartbeat import GracefulStop, RELAY_S
with GracefulStop(100, "go on with --resume RUN"):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(RELAY_S + 0.1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""


def test_a_second_ctrl_c_ends_at_once_without_a_traceback() -> None:
    command = [sys.executable, "-c", INTERRUPTED_TWICE]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 128 + signal.SIGINT and "go on with --resume RUN" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_sigterm_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "RELAY_S", -1.0)
    with GracefulStop(100) as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked


def test_ctrl_c_before_the_first_step_is_one_line(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Run, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_load_policy", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(trainer.flags(tmp_path / "run"))
    assert exit_.value.code == 128 + signal.SIGINT
    assert "error: Ctrl-C" in capsys.readouterr().err

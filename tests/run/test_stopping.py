"""Ctrl-C is SIGTERM: the step is finished, the run saved, and said how to go on; a second one ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.run.checkpoint import checkpoints, latest_checkpoint, step_of
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


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_lost_terminal_asks_to_stop_and_writing_to_it_fails_no_more(is_ignored: bool) -> None:
    """As when a connection breaks off; with `nohup` the run goes on."""
    kept, previous = os.dup(2), signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    terminal, line = os.openpty()
    try:
        with GracefulStop(100) as stop:
            os.dup2(line, 2)
            os.close(terminal)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked is not is_ignored
            if not is_ignored:
                os.write(2, b"step 3\n")
    finally:
        os.dup2(kept, 2)
        signal.signal(signal.SIGHUP, previous)
        for descriptor in (kept, line):
            os.close(descriptor)


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


@pytest.fixture(scope="module")
def evaluated(trainer, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """A run that was not stopped, and its words: two queries in two modes, before the first step and after a phase."""
    held_out = ("--eval_annotations", str(clips / "annotations/test.json"), "--eval_modes", "answer+think")
    words = ("--phases", "sft:2,sft/think:1", *held_out, "--max_eval_samples", "2", "--eval_batch_size", "1")
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    trainer.main(folder, *words)
    return folder, words


@pytest.mark.parametrize("when", [1, pytest.param(5, marks=pytest.mark.slow), 7])
def test_ctrl_c_in_an_evaluation_saves_and_it_is_made_up_for(
    trainer, evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, when: int
) -> None:
    """In the evaluation before the first step, in that after a phase, and in the second mode of that."""
    whole, words = evaluated
    folder, greedy, calls = tmp_path / "run", Run.greedy, []

    def interrupted(run: Run, *arguments: Any) -> Any:
        calls.append(run)
        if len(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return greedy(run, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "greedy", interrupted)
        trainer.main(folder, *words)
    assert "is made up for" in caplog.text and f"go on with --resume {folder}" in caplog.text
    assert [step_of(each) for each in checkpoints(folder)] == ([2] if when > 4 else [])
    main(["--resume", str(folder)])
    assert json.loads((folder / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    assert [row["step"] for row in read_metrics(folder)] == [row["step"] for row in read_metrics(whole)]


def test_ctrl_c_in_eval_is_one_line_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tempsamp_fast import eval as door

    def interrupted(options: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(door, "evaluate", interrupted)
    words = ["--model", "m", "--annotations", "a.json", "--videos", "v", "--output", str(tmp_path / "answers")]
    assert door.main(words) == 128 + signal.SIGINT
    assert capsys.readouterr().err == f"error: Ctrl-C; the same words go on with the answers in {tmp_path}/answers\n"

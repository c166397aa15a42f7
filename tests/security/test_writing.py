"""Where files are written: never through a link that someone laid, never into another user's folder."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.config import RolloutConfig, TrainConfig
from tempsamp_fast.eval import AnswerFiles
from tempsamp_fast.evaluation.asking import write_rows
from tempsamp_fast.learning.groups import RecordedRollouts
from tempsamp_fast.report.__main__ import main as report
from tempsamp_fast.report.plots import plot_run, plot_timeline
from tempsamp_fast.run.log import RunLog, drop_rows_from, write_json
from tempsamp_fast.run.resume import open_folder
from tempsamp_fast.system.durable import remove
from tempsamp_fast.system.files import fresh_folder, open_to_append, own_folder
from tempsamp_fast.system.heartbeat import Heartbeat

SECRET = "ssh-ed25519 AAAA\n"
ROW = {"step": 0, "phase": "sft/answer", "reward/tiou": 0.5}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file of the victim's, outside the run folder."""
    path = tmp_path / "authorized_keys"
    path.write_text(SECRET)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o770)
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "config.json").write_text(json.dumps({"data": {"task": "grounding"}, "model": {"model": "tiny"},
                                                    "train": {"seed": 0, "phases": "sft:1"}}))  # fmt: skip
    return folder


def heartbeat(run: Path) -> None:
    with Heartbeat(run, 0, 1, 60.0):
        pass


def add(path: Path) -> None:
    with open_to_append(path) as file:
        file.write("more\n")


ANSWERS: dict[str, Callable[[Path], object]] = {
    "report.html": lambda run: report([str(run)]),
    "plots/reward.png": plot_run,
    "eval/start_answer.jsonl": lambda run: write_rows(run / "eval/start_answer.jsonl", [ROW]),
    "results.json": lambda run: write_json(run / "results.json", [ROW]),
    "metrics.jsonl": lambda run: drop_rows_from(run / "metrics.jsonl", 0),
    "heartbeat/rank_0000.json": heartbeat,
    "answer.jsonl": lambda run: AnswerFiles(run, "answer", 0).merge([ROW]),
    "answer.0.jsonl": lambda run: AnswerFiles(run, "answer", 0),
}


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_link_in_a_run_folder_is_replaced_not_written_through(
    run: Path, target: Path, name: str, suffix: str, link: Callable[[Path, Path], None]
) -> None:
    """The file and the one that is written before it, at every door that writes into a run or an evaluation."""
    path = run / (name + suffix)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if name in ("metrics.jsonl", "answer.0.jsonl"):
        target.write_text(json.dumps(ROW) + "\nhalf a line")
    before = target.read_text()
    link(path, target)
    ANSWERS[name](run)
    assert target.read_text() == before


@pytest.mark.parametrize("lay", [Path.symlink_to, Path.hardlink_to, lambda path, _: os.mkfifo(path)])
@pytest.mark.parametrize("write", [add, lambda path: RecordedRollouts(path, None).write(0, [], [])])  # type: ignore
def test_nothing_is_added_to_a_link_or_a_pipe(
    tmp_path: Path, target: Path, lay: Callable[..., None], write: Callable[[Path], None]
) -> None:
    path = tmp_path / "answer.1.jsonl"
    lay(path, target)
    with pytest.raises((OSError, ValueError), match=r"answer\.1\.jsonl"):
        write(path)
    assert target.read_text() == SECRET


@pytest.mark.parametrize("name", ["eval", "plots", "heartbeat", "tensorboard"])
def test_a_folder_in_a_run_that_is_a_link_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).symlink_to(outside)
    doors = {"eval": ANSWERS["eval/start_answer.jsonl"], "plots": plot_run, "heartbeat": heartbeat}
    with pytest.raises(ValueError, match=f"{name}: is a link"):
        doors.get(name, lambda run: own_folder(run / name))(run)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_folder_made_beforehand_by_another_user_is_refused(tmp_path: Path, resume: bool) -> None:
    """The folder, and a link of theirs to a folder of ours; a shared folder above and one of our own with 0770 work."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o770)
    other, ours, link = shared / "other", shared / "ours", shared / "link"
    for folder in (other, ours):
        folder.mkdir(mode=0o770)
    link.symlink_to(ours)
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    for path in (shared, other, link):
        os.chown(path, 65534, 65534, follow_symlinks=False)

    def opened(folder: Path) -> Path:
        given = {"resume": str(folder)} if resume else {"output_dir": str(folder)}
        return open_folder(TrainConfig(**given), RolloutConfig()).path  # type: ignore[arg-type]

    for path in (other, link):
        with pytest.raises(ValueError, match="belongs to another user"):
            opened(path)
    assert opened(ours) == ours
    os.chown(link, 0, 0, follow_symlinks=False)
    assert opened(link) == link


def test_what_is_made_anew_follows_no_link(tmp_path: Path) -> None:
    """Unfinished checkpoints, the embedded model and conversions are made in place of whatever had their name."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    place = tmp_path / "step_000001"
    place.symlink_to(outside)
    assert list(fresh_folder(place).iterdir()) == [] and not place.is_symlink()
    (tmp_path / "step_000001.old.partial").symlink_to(outside)
    remove(place)
    assert not place.exists() and [path.name for path in outside.iterdir()] == ["kept"]


def test_folders_that_are_made_are_for_this_user_alone(tmp_path: Path, run: Path) -> None:
    new = open_folder(TrainConfig(output_dir=str(tmp_path / "new")), RolloutConfig())
    write_rows(run / "eval/start_answer.jsonl", [ROW])
    for path in (own_folder(tmp_path / "a/b"), new.path, run / "eval"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_a_query_with_dollars_is_drawn_as_it_is(tmp_path: Path) -> None:
    frames = np.zeros((2, 3, 8, 8), dtype=np.uint8)
    query = r"pays $\frac{1 for $$ and $\undefined$"
    path = plot_timeline(frames, [0.0, 1.0], 2.0, {query: (0.0, 1.0)}, query, tmp_path / "answer.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_log_is_added_to_the_file_that_was_opened(tmp_path: Path, target: Path) -> None:
    """Also when a link takes its name while the run goes on."""
    from tempsamp_fast.arguments import parse_args

    with RunLog(tmp_path / "run", parse_args([]), 1, 0, active=True) as log:
        for name in ("metrics.jsonl", "groups.jsonl"):
            (tmp_path / "run" / name).unlink()
            (tmp_path / "run" / name).symlink_to(target)
        log.log(0, "sft", {"loss": 1.0})
    assert target.read_text() == SECRET

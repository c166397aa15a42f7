"""What a resumed run takes, passes over and refuses."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.run import checkpoint
from tempsamp_fast.run.checkpoint import checkpoints, sound_checkpoint, step_of
from tempsamp_fast.run.log import drop_rows_from, read_metrics
from tempsamp_fast.run.resume import check_same_run, samples_digest
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import PhaseStep
from tempsamp_fast.system import durable
from tempsamp_fast.train import main


@pytest.fixture
def run(finished_run, tmp_path: Path) -> Path:
    """A copy of a finished run: checkpoints after steps 4 and 5, a reference model."""
    return shutil.copytree(finished_run.folder, tmp_path / "run")


def spoil(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_state(folder: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change what the folder's state.json holds."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    (folder / "state.json").write_text(json.dumps(state | changed(state)))


def write_files(folder: Path, changed: Callable[[dict[str, Any]], Any]) -> None:
    write_state(folder, lambda state: {"files": changed(state["files"])})


SPOILED: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the weights": lambda folder: spoil(folder / "model/model.safetensors"),
    "a flipped bit in the engine's state": lambda folder: spoil(next((folder / "engine/state").iterdir())),
    "a missing file": lambda folder: (folder / "model/tokenizer.json").unlink(),
    "an empty state.json": lambda folder: (folder / "state.json").write_text(""),
    "files that are a number": lambda folder: write_files(folder, lambda files: 3),
    "no files": lambda folder: write_files(folder, lambda files: {}),
    "a list of no files": lambda folder: write_files(folder, lambda files: []),
    "a file whose digest is a number": lambda folder: write_files(folder, lambda files: files | {"engine": 3}),
    "a file whose digest lacks its hash": lambda folder: write_files(folder, lambda files: files | {"engine": [3]}),
    "a state.json of another step": lambda folder: shutil.copy(folder.parent / "step_000004/state.json", folder),
    "a step that is not the one of its name": lambda folder: write_state(folder, lambda _: {"step": 4}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(
    run: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    SPOILED[what](run / "checkpoints/step_000005")
    with caplog.at_level(logging.WARNING):
        found = sound_checkpoint(run)
    assert found is not None and found[0].name == "step_000004" and found[1]["step"] == 4
    assert "step_000005" in caplog.text
    assert [folder.name for folder in checkpoints(run)] == ["step_000004"]
    assert (run / "checkpoints/step_000005.broken").is_dir()


def test_where_every_checkpoint_is_broken_each_is_named_and_none_is_moved(run: Path, refused) -> None:
    for folder in checkpoints(run):
        spoil(folder / "model/model.safetensors")
    for _ in range(2):
        line = refused(["--resume", str(run)])
        assert "step_000004" in line and "step_000005" in line and "model.safetensors is not as it was written" in line


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(run: Path, finished_run, without_times) -> None:
    spoil(run / "checkpoints/step_000005/model/model.safetensors")
    main(["--resume", str(run)])
    assert without_times(read_metrics(run)) == without_times(finished_run.rows)
    assert [folder.name for folder in checkpoints(run)] == ["step_000004", "step_000005"]


def test_a_broken_or_missing_reference_model_is_refused(run: Path, refused) -> None:
    words = ["--resume", str(run), "--phases", "sft:2,tempsamp:4"]
    spoil(run / "reference/model.safetensors")
    assert "reference model is broken: model.safetensors" in refused(words)
    write_files(run / "reference", lambda files: 3)
    assert "reference model is broken: state.json cannot be read: files is 3" in refused(words)
    shutil.rmtree(run / "reference")
    assert "reference model is missing" in refused(words)


def test_what_a_killed_start_left_does_not_stop_the_next(trainer, tmp_path: Path) -> None:
    """A reference model and half a checkpoint, but no row yet."""
    for name in ("reference", "reference.partial", "checkpoints/step_000001.partial"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "model.safetensors").write_text("of another run")
    rows = trainer.main(tmp_path / "run", "--phases", "tempsamp:2", "--beta", "0.04", "--save_steps", "1")
    assert [row["step"] for row in rows] == [0, 1]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_000001", "step_000002"]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_beginning(
    run: Path, finished_run, without_times
) -> None:
    shutil.rmtree(run / "checkpoints")
    main(["--resume", str(run)])
    assert without_times(read_metrics(run)) == without_times(finished_run.rows)


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "phase": "sft"}\n{"step": 1, "phase": "sft"}\n{"step": 2, "pha')
    drop_rows_from(path, first_step=2)
    assert path.read_text() == '{"step": 0, "phase": "sft"}\n{"step": 1, "phase": "sft"}\n'


CHANGED = {
    "--seed": "1",
    "--prompts_per_device": "2",
    "--gradient_accumulation_steps": "1",
    "--zero_stage": "1",
    "--dtype": "bfloat16",
    "--fps": "2",
    "--task": "multi_grounding",
    "--phases": "sft:1,tempsamp:4",
}


def test_settings_that_make_it_another_run_are_all_listed_and_refused(run: Path, refused) -> None:
    line = refused(["--resume", str(run), *(word for pair in CHANGED.items() for word in pair)])
    for name, value in CHANGED.items():
        assert f"{name.removeprefix('--')} was " in line and value in line
    assert read_metrics(run) and len(checkpoints(run)) == 2


def test_a_zero_stage_that_deepspeeds_settings_change_is_refused(run: Path, refused) -> None:
    line = refused(["--resume", str(run), "--deepspeed_config", "zero2", "--phases", "sft:2,tempsamp:4"])
    assert "zero_stage was 0, is 2 by deepspeed_config='zero2'" in line


def test_a_stage_may_be_asked_for_in_another_way(trainer, tmp_path: Path) -> None:
    words = ("--phases", "sft:2", "--save_steps", "1", "--zero_stage")
    trainer.main(tmp_path / "run", "--phases", "sft:1", "--deepspeed_config", "zero1")
    rows = trainer.main(tmp_path / "run", *words, "1", "--resume", str(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1]


def test_other_data_and_more_rows_a_step_are_refused_and_other_changes_logged(
    run: Path, trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = parse_args(["--resume", str(run), "--learning_rate", "1e-5", "--videos", "elsewhere"])
    samples = trainer.run(tmp_path / "other", "--phases", "sft:1").train_samples
    found = sound_checkpoint(run)
    assert found is not None
    state = found[1]
    with caplog.at_level(logging.INFO):
        check_same_run(run, state, config, samples, 1)
    assert "learning_rate was 0.0002, is 1e-05" in caplog.text and "videos was" in caplog.text
    with pytest.raises(ValueError, match=r"was 2 on 1 ranks, is 2 on 2: .*; samples was 16 samples, .* is 15 samples"):
        check_same_run(run, state, config, samples[1:], 2)
    assert samples_digest(samples) != samples_digest(samples[::-1])


def test_a_run_of_an_earlier_version_is_continued_unchecked_with_a_warning(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = run / "checkpoints/step_000005/state.json"
    state.write_text('{"step": 5}')
    with caplog.at_level(logging.WARNING):
        found = sound_checkpoint(run)
    assert found == (state.parent, {"step": 5})
    assert "made by an earlier version" in caplog.text


def test_settings_that_this_version_does_not_have_are_listed(run: Path, refused) -> None:
    config = json.loads((run / "config.json").read_text())
    config["train"]["warp_speed"] = 9
    (run / "config.json").write_text(json.dumps(config))
    assert "warp_speed=9" in refused(["--resume", str(run)])
    (run / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(["--resume", str(run)])


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_engines_state_is_not_run(run: Path, refused, tmp_path: Path) -> None:
    """Not even where the hashes were made to fit."""
    folder = run / "checkpoints/step_000005"
    (state,) = (folder / "engine/state").iterdir()
    content = torch.load(state, weights_only=False) | {"client_state": Bomb(tmp_path / "exploded")}
    torch.save(content, state)
    facts = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    files = {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
    digests = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    (folder / "state.json").write_text(json.dumps(facts | {"files": digests}))
    line = refused(["--resume", str(run), "--phases", "sft:2,tempsamp:4"])
    assert state.name in line and "--allow_pickle" in line
    assert not (tmp_path / "exploded").exists()


def test_weights_in_a_pickle_are_refused(trainer, checkpoint: Path, refused, tmp_path: Path) -> None:
    pickled = shutil.copytree(checkpoint, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "exploded")}))
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:1", "--model", str(pickled)))
    assert str(pickled) in line and "safetensors" in line
    assert not (tmp_path / "exploded").exists()


def test_a_run_folder_is_private(finished_run) -> None:
    assert stat.S_IMODE(finished_run.folder.stat().st_mode) == 0o700


def test_a_disk_that_is_almost_full_is_noticed_before_anything_is_written(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:1"))
    assert "almost full" in line and "step_000001" in line
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_a_disk_without_room_for_a_checkpoint_like_the_last_is_almost_full(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a tenth more."""
    run = trainer.run(tmp_path / "run", "--phases", "sft:2")
    run.save(1)
    run.saving.finish()
    (last,) = checkpoints(run.folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=durable.size_of(last)))
    with pytest.raises(OSError, match=r"step_000002: checkpoint not written: .*almost full"):
        run.save(2)
    assert checkpoints(run.folder) == [last]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, its folders and the run's records first; after its name the folder that holds it."""
    synced: list[Path] = []
    before: dict[str, list[Path]] = {}
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recording_rename(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            before[path.name] = [*synced]
            synced.clear()
            whole = [path, *path.rglob("*")]
            assert set(whole) <= set(before[path.name]), path
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    held_out = ("--eval_annotations", str(trainer.clips / "annotations/test.json"), "--max_eval_samples", "1")
    trainer.main(tmp_path / "run", "--phases", "tempsamp:1", "--beta", "0.04", *held_out)
    assert before.keys() == {"reference.partial", "step_000001.partial"}
    records = {tmp_path / "run" / name for name in ("metrics.jsonl", "groups.jsonl", "results.json", "config.json")}
    assert records <= set(before["step_000001.partial"])
    assert synced[0] == tmp_path / "run/checkpoints"


def test_training_goes_on_while_a_checkpoint_is_brought_to_the_disk(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a name until it is there, and awaited before the next one and at the end."""
    seen: list[tuple[int, list[str]]] = []
    may_go_on, publish, update = threading.Event(), durable.publish, Run.update

    def late(final: Path) -> None:
        assert may_go_on.wait(60)
        publish(final)

    def noting(run: Run, at: PhaseStep, groups: Any) -> Any:
        seen.append((at.step, [path.name for path in checkpoints(tmp_path / "run")]))
        if at.step == 1:
            may_go_on.set()
        return update(run, at, groups)

    monkeypatch.setattr(checkpoint, "publish", late)
    monkeypatch.setattr(Run, "update", noting)
    trainer.main(tmp_path / "run", "--phases", "sft:3", "--save_steps", "1", "--keep_checkpoints", "9")
    assert seen[:2] == [(0, []), (1, [])] and "step_000001" in seen[2][1]
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step_{step:06d}" for step in (1, 2, 3)]


@pytest.mark.parametrize("failing", ["hashed", "named"])
@pytest.mark.parametrize("last_failing", [2, 4])
def test_a_checkpoint_that_fails_in_the_background_is_made_up_for_and_two_end_the_run(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, failing: str, last_failing: int
) -> None:
    """In time, not when the next one is due; those before stay."""
    module, name = {"hashed": (durable, "_digest"), "named": (checkpoint, "publish")}[failing]
    done = getattr(module, name)

    def breaking(path: Path) -> Any:
        if any(f"step_{step:06d}" in str(path) for step in range(2, last_failing + 1)):
            raise OSError(28, "No space left on device")
        return done(path)

    monkeypatch.setattr(module, name, breaking)
    is_save_step = Run.is_save_step
    monkeypatch.setattr(Run, "is_save_step", lambda run, at: at.step < 2 and is_save_step(run, at))
    words = ("--phases", "sft:9", "--save_steps", "1", "--keep_checkpoints", "9")
    if last_failing == 2:
        trainer.main(tmp_path / "run", *words)
        (told,) = [record.message for record in caplog.records if "another one is made" in record.message]
        left = [step_of(each) for each in checkpoints(tmp_path / "run")]
        assert left[0] == 1 and left[-1] == 9 and left[1] in range(3, 7)
    else:
        told = refused(trainer.flags(tmp_path / "run", *words))
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]
    assert ": not written" in told and "No space left" in told


def test_a_run_that_ends_by_an_error_leaves_the_checkpoint_that_it_was_writing(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, update = durable.publish, Run.update

    def late(final: Path) -> None:
        time.sleep(1)
        publish(final)

    def failing(run: Run, at: PhaseStep, groups: Any) -> Any:
        if at.step == 1:
            raise ValueError("the second step fails")
        return update(run, at, groups)

    monkeypatch.setattr(checkpoint, "publish", late)
    monkeypatch.setattr(Run, "update", failing)
    assert "the second step fails" in refused(trainer.flags(tmp_path / "run", "--phases", "sft:3", "--save_steps", "1"))
    assert [step_of(each) for each in checkpoints(tmp_path / "run")] == [1]


@pytest.mark.parametrize("tired", [False, True])
def test_a_rank_does_not_wait_for_ever_for_the_parts_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tired: bool
) -> None:
    """Of two: one that is gone, when the run ends; one that says that it failed, at once."""
    monkeypatch.setattr(durable, "num_ranks", lambda: 2)
    monkeypatch.setattr(durable, "PATIENCE_S", 0.0)
    monkeypatch.setattr(durable, "barrier", lambda: None)
    monkeypatch.setattr(durable, "of_all_ranks", lambda own: [own, ("rank 1: No space left", False)])
    final = tmp_path / "step_000001"
    folder = durable.partial_folder(final)
    folder.mkdir()
    (folder / "weights").write_bytes(b"w")
    sealing = durable.Sealing(final, lambda _: pytest.fail("not whole"))
    if tired:
        sealing.finish_alone()
    else:
        with pytest.raises(OSError, match="rank 1: No space left"):
            sealing.wait()
    assert not folder.exists() and not sealing.has_failed

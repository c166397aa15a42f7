"""Run folders of strangers given to the trainer and to what reads its checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from tempsamp_fast.export import export
from tempsamp_fast.export import main as export_main
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.train import main

WRITTEN = (
    *("metrics.jsonl", "groups.jsonl", "results.json", "config.json", "machine.json", "error.log", "summary.json"),
    *("heartbeat/rank_0000.json", "plots/reward.png", "eval/2_tempsamp_answer_answer.jsonl"),
)
MORE = ("--phases", "sft:2,tempsamp:4")


@pytest.fixture
def run(finished_run, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run.folder, tmp_path / "run")


def set_in_record(run: Path, section: str, **settings: Any) -> None:
    path = run / "config.json"
    found = json.loads(path.read_text())
    found[section] |= settings
    path.write_text(json.dumps(found))


def test_a_resumed_run_writes_through_no_link(run: Path, pictures: None, tmp_path: Path) -> None:
    """Every file that it adds to, replaces, or makes beside one."""
    victims = []
    for name in WRITTEN:
        for path in (run / name, run / f"{name}.partial"):
            victims.append(tmp_path / f"victim{len(victims)}")
            if path.is_file():
                shutil.copy(path, victims[-1])
                path.unlink()
            else:
                victims[-1].write_text("a secret")
                path.parent.mkdir(exist_ok=True)
            path.symlink_to(victims[-1])
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / "checkpoints/step_000006.partial").symlink_to(outside)
    before = [path.read_bytes() for path in victims]
    main(["--resume", str(run), *MORE])
    assert [path.read_bytes() for path in victims] == before and list(outside.iterdir()) == []
    assert latest_checkpoint(run)[1] == 6


@pytest.mark.parametrize("name", ["checkpoints", "eval", "plots", "heartbeat", "tensorboard"])
def test_a_resumed_run_writes_into_no_folder_elsewhere(
    run: Path, pictures: None, refused, tmp_path: Path, name: str
) -> None:
    outside = (run / name).rename(tmp_path / "outside") if (run / name).exists() else tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert f"{name}: is a link" in refused(["--resume", str(run), *MORE])
    assert sorted(outside.rglob("*")) == before


def test_the_embedded_model_is_made_anew(run: Path, tmp_path: Path, trainer, refused) -> None:
    """A run that never reached a checkpoint begins again, not through the links that lie where its model would."""
    victim, embedded = tmp_path / "victim", run / "tiny_model"
    victim.write_text("a secret")
    embedded.mkdir()
    (embedded / "model.safetensors").symlink_to(victim)
    shutil.rmtree(run / "checkpoints")
    main(["--resume", str(run), "--model", "tiny", "--phases", "sft:1", "--beta", "0"])
    assert victim.read_text() == "a secret" and not (embedded / "model.safetensors").is_symlink()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "video.json", "chat_template.jinja"])
def test_no_file_of_mine_goes_into_a_checkpoint_or_an_export(
    run: Path,
    refused,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    link: Callable[[Path, Path], None],
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"token": "hf_secret"}')
    model = latest_checkpoint(run)[0] / "model"
    (model / name).unlink(missing_ok=True)
    link(model / name, secret)
    (model.parent / "state.json").write_text(json.dumps({"step": 5}))
    assert name in refused(["--resume", str(run), *MORE])
    assert export_main([str(run), str(tmp_path / "out")]) == 2
    assert name in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_resumed_run_asks_the_hub_for_nothing(
    run: Path, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no model from there; where it does, the error names the flag."""
    from transformers.utils import hub

    asked: list[Any] = []
    download = hub.hf_hub_download

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(constants.HF_HUB_OFFLINE)
        return download(*arguments, **options)

    monkeypatch.setattr(hub, "hf_hub_download", counted)
    set_in_record(run, "model", model="someone/model")
    main(["--resume", str(run), *MORE])
    assert asked == [] and read_metrics(run)[-1]["step"] == 6
    shutil.rmtree(run / "checkpoints")
    assert "--model" in refused(["--resume", str(run), *MORE])
    assert all(asked)


def test_an_honest_export_is_as_before(run: Path, tmp_path: Path) -> None:
    """Of a run in a folder that a group may write into."""
    run.chmod(0o770)
    export(run, tmp_path / "out", torch.float32)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "video.json"} <= names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", {"../../../secret": [1, "x"]}), ("files", {"/etc/passwd": [1, "x"]}),
        ("files", [1]), ("files", {"a": 1}),
        ("step", "x"), ("step", 7), ("step", None), ("step", 10**400),
        ("config", {"train": 7}), ("config", [1]), ("config", {"train": {"phases": 3}}), ("world_size", [2]),
        ("zero_stage", {}), ("samples", 7),
    ],
)  # fmt: skip
def test_a_state_of_anything_is_one_line(run: Path, refused, field: str, value: Any) -> None:
    """It names files in its folder alone, and says how the run was made in no other way than runs do."""
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {field: value}))
    assert len(refused(["--resume", str(run), *MORE])) < 2000


@pytest.mark.parametrize("name", ["step_abc", "step_", "step_000009.old", "step_-00001", "step_9999999999999999"])
def test_a_folder_beside_the_checkpoints_is_none(run: Path, name: str) -> None:
    last = latest_checkpoint(run)
    shutil.copytree(last[0], run / "checkpoints" / name)
    assert latest_checkpoint(run) == last


@pytest.mark.parametrize(
    "row",
    ["3", "[]", "{}", "{", '{"step": 0, "sample_id": [], "mode": "answer", "ids": []}',
     '{"step": 0, "sample_id": "a", "mode": "answer", "ids": [[1, 99999999]]}',
     '{"step": 0, "sample_id": "a", "mode": "answer", "ids": [[-1]]}',
     '{"step": 0, "sample_id": "a", "mode": "answer", "ids": 7}'],
)  # fmt: skip
def test_recorded_answers_of_anything_are_named(trainer, tmp_path: Path, row: str) -> None:
    (tmp_path / "kept.jsonl").write_text(row + "\n")
    run = trainer.run(tmp_path / "run", "--phases", "grpo:1", "--replay_rollouts", str(tmp_path / "kept.jsonl"))
    at = next(plan(run.phases))
    with pytest.raises(ValueError, match=r"kept\.jsonl"):
        run.answer(at, run.prompts(at))

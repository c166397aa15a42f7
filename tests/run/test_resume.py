"""A run that was interrupted and continued is the run that was not; checkpoints are ordinary folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.run.checkpoint import checkpoints, latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.train import main


def engine_weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "engine/state").glob("*model_states.pt")
    return torch.load(file, weights_only=False)["module"]


@pytest.mark.parametrize("num_steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_resumed_run_is_the_undisturbed_run(
    trainer, finished_run, without_times, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """Interrupted after a step whose checkpoint was not written any more, in the first or in the second phase."""
    folder = tmp_path / "run"
    save = Run.save

    def interrupted(run: Run, done: int) -> None:
        if done > num_steps:
            raise KeyboardInterrupt
        save(run, done)

    monkeypatch.setattr(Run, "save", interrupted)
    with pytest.raises(SystemExit):
        trainer.main(folder, *finished_run.words)
    monkeypatch.setattr(Run, "save", save)
    assert read_metrics(folder)[-1]["step"] >= num_steps
    main(["--resume", str(folder)])

    resumed, undisturbed = without_times(read_metrics(folder)), without_times(finished_run.rows)
    order = lambda row: (row["step"], row["phase"] != "eval")
    assert sorted(resumed, key=order) == sorted(undisturbed, key=order)
    assert [(row["step"], row["phase"]) for row in resumed] == [(row["step"], row["phase"]) for row in undisturbed]
    assert json.loads((folder / "results.json").read_text()) == json.loads(
        (finished_run.folder / "results.json").read_text()
    )
    groups = [(path / "groups.jsonl").read_text() for path in (folder, finished_run.folder)]
    assert groups[0] == groups[1]
    ours, theirs = (engine_weights(latest_checkpoint(path)[0]) for path in (folder, finished_run.folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_can_be_resumed_to_train_on(finished_run, without_times, tmp_path: Path) -> None:
    folder = shutil.copytree(finished_run.folder, tmp_path / "run")
    main(["--resume", str(folder), "--phases", "sft:2,tempsamp:4"])
    rows = without_times(read_metrics(folder))
    kept = without_times(finished_run.rows)
    assert rows[: len(kept)] == kept
    assert [(row["step"], row["phase"]) for row in rows[len(kept) :]] == [(5, "tempsamp/answer"), (6, "eval")]


def test_answers_are_added_to_a_record_by_a_resumed_run_alone(trainer, refused, tmp_path: Path) -> None:
    record = tmp_path / "answers.jsonl"
    words = ("--record_rollouts", str(record), "--phases")
    trainer.main(tmp_path / "run", *words, "grpo:1")
    line = refused(trainer.flags(tmp_path / "other", *words, "grpo:1"))
    assert f"record_rollouts='{record}' exists" in line and not (tmp_path / "other").exists()
    lost = [json.loads(row) | {"step": 1} for row in record.read_text().splitlines()]
    with record.open("a") as file:  # answers of a step that the run was killed in
        file.writelines(json.dumps(row) + "\n" for row in lost)
    trainer.main(tmp_path / "run", *words, "grpo:2", "--resume", str(tmp_path / "run"))
    assert [json.loads(row)["step"] for row in record.read_text().splitlines()] == [0, 0, 1, 1]


@pytest.mark.parametrize("stage", ["0", "2"])
def test_weight_decay_and_beta_of_a_resumed_run_are_what_is_asked_for(trainer, tmp_path: Path, stage: str) -> None:
    folder = tmp_path / "run"
    trainer.main(folder, "--phases", "sft:1", "--zero_stage", stage)
    run = Run(parse_args(["--resume", str(folder), "--weight_decay", "0.25", "--adam_beta2", "0.5"]))
    settings = [(group["weight_decay"], group["betas"][1]) for group in run.engine.optimizer.param_groups]
    assert settings and set(settings) == {(0.25, 0.5)}


def test_an_engine_state_has_the_frozen_weights_too(trainer, tmp_path: Path) -> None:
    trainer.main(tmp_path / "run", "--phases", "sft:1", "--freeze_vision")
    assert any("visual" in name for name in engine_weights(latest_checkpoint(tmp_path / "run")[0]))


def test_the_newest_checkpoints_are_kept(finished_run) -> None:
    assert [path.name for path in checkpoints(finished_run.folder)] == ["step_000004", "step_000005"]
    assert sorted(path.name for path in (finished_run.folder / "checkpoints").iterdir()) == [
        "step_000004",
        "step_000005",
    ]


def test_a_checkpoint_loads_with_plain_from_pretrained(finished_run) -> None:
    """With the weights that were trained, `use_cache` as generation wants it, and the tokenizer."""
    folder, _ = latest_checkpoint(finished_run.folder)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder / "model", output_loading_info=True)
    model, loading = loaded
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    trained = engine_weights(folder)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trained[f"model.{name}"]), name
    text_config: Any = model.config.text_config
    assert text_config.use_cache is True
    assert model.generation_config.use_cache is True
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"


def test_a_checkpoint_can_be_trained_further_as_a_model(finished_run, trainer, tmp_path: Path) -> None:
    """Its processor settings, which a published checkpoint has beside its weights, are carried over."""
    model = shutil.copytree(latest_checkpoint(finished_run.folder)[0] / "model", tmp_path / "model")
    (model / "preprocessor_config.json").write_text('{"patch_size": 14}')
    (row,) = trainer.main(tmp_path / "run", "--phases", "sft:1", "--model", str(model))
    assert row["loss"] < finished_run.rows[1]["loss"]
    saved = latest_checkpoint(tmp_path / "run")[0] / "model/preprocessor_config.json"
    assert json.loads(saved.read_text()) == {"patch_size": 14}

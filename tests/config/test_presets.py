"""Methods as recipes: what each sets, in what the release differs from the paper, and that the tiny model trains."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tempsamp_fast.arguments import RECIPES, parse_args
from tempsamp_fast.run.log import read_metrics

PRESETS = ("paper", "release", "orarl", "timelens", "timelens2")
SMALL = ("--video_backend", "torchcodec", "--fps", "1", "--min_pixels", "3136", "--max_pixels", "3136",
         "--num_generations", "4", "--max_completion_length", "12", "--gradient_accumulation_steps", "1",
         "--max_eval_samples", "0", "--duration_range", ":")  # fmt: skip
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "phases": ("tempsamp/answer:1epoch,tempsamp/think:1epoch", "tempsamp/answer:1epoch"),
    "answer_form": ("text", "example"),
    "format_reward": ("think", "add"),
    "format_weight": (1.0, 0.1),
    "epsilon_high": (0.2, 0.28),
    "dual_clip": (None, 3.0),
    "beta": (0.04, 0.0),
    "loss_type": ("grpo", "dapo"),
    "top_p": (1.0, 0.85),
    "max_completion_length": (2048, 256),
    "min_pixels": (16 * 28 * 28, 4096),
    "max_pixels": (768 * 28 * 28, 786_432),
    "total_pixels": (3584 * 28 * 28, 2 * 14_336 * 32 * 32),
    "freeze_vision": (False, True),
    "warmup_ratio": (0.0, 0.05),
    "weight_decay": (0.0, 0.01),
}
"""In what the published tables say that the paper and its release differ."""


def settings_of(*words: str) -> dict[str, Any]:
    config = parse_args(["--config", *words])
    return {field.name: getattr(section, field.name) for section in vars(config).values() for field in fields(section)}


def test_the_release_differs_from_the_paper_where_the_table_says_and_nowhere_else() -> None:
    paper, release = settings_of("paper"), settings_of("release")
    found = {name: (paper[name], release[name]) for name in paper if paper[name] != release[name]}
    print("\n".join(f"{name}: paper {ours!r}, release {theirs!r}" for name, (ours, theirs) in found.items()))
    assert found == DIFFERENT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("orarl", {"shaping": "orarl", "prune_ratio": 0.5, "num_generations": 9, "top_p": 0.85, "max_frames": 128,
                   "epsilon_high": 0.2, "beta": 0.0, "format_reward": "factor", "learning_rate": 2e-6,
                   "gradient_accumulation_steps": 8, "max_completion_length": 4096, "answer_form": "strict"}),
        ("timelens", {"beta": 0.0, "scale_rewards": False, "num_generations": 8, "max_completion_length": 512,
                      "phases": "grpo/answer:100", "answer_form": "sentence", "top_p": 1.0}),
        ("timelens2", {"beta": 0.04, "scale_rewards": False, "rewards": "wasserstein", "task": "multi_grounding",
                       "phases": "grpo/answer:200", "answer_form": "json", "max_frames": 512}),
    ],
)  # fmt: skip
def test_the_methods_of_others_are_set_as_published(name: str, expected: dict[str, Any]) -> None:
    assert expected.items() <= settings_of(name).items()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_no_data_no_model_and_no_place(name: str) -> None:
    """So that it goes over any recipe that does."""
    entries = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert not {"base", "model", "annotations", "videos", "eval_annotations", "output_dir"} & entries.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_over_a_recipe_of_data_and_model(name: str, tmp_path: Path) -> None:
    entries = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"base": "charades_qwen3_vl_4b", **entries}))
    merged = settings_of(str(tmp_path / "both.yaml"))
    assert merged["annotations"] == "charades-train" and merged["model"] == "Qwen/Qwen3-VL-4B-Instruct"
    assert {key: merged[key] for key in entries} == entries


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_passes_a_dry_run_and_trains_the_tiny_model(
    name: str, trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tempsamp_fast.train import main  # loads DeepSpeed

    preset = settings_of(name)
    phases = preset["phases"].replace(":1epoch", ":1").replace("00", "")
    _, _, *folders = trainer.flags(tmp_path / "run")
    words = ["--config", name, *folders, *SMALL, "--phases", phases]
    main([*words, "--dry_run", "true"])
    assert "steps" in capsys.readouterr().out and not (tmp_path / "run").exists()
    main(words)
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == sum(int(part.rpartition(":")[2]) for part in phases.split(","))
    assert all(abs(row["loss"]) < 100 for row in rows)
    assert all(("prune/flops_saved" in row) == bool(preset["prune_ratio"]) for row in rows)

"""Ranks that partition linear layers and experts, against one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.learning.test_ranks import COMPARED

STEPS = ("--phases", "sft:2,tempsamp:3", "--beta", "0.04", "--learning_rate", "1e-4", "--model", "tiny")


def slow(family: str, stage: str):
    return pytest.param(family, stage, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "stage"),
    [
        slow("qwen3_5_moe", "3"),
        slow("qwen3_5", "2"),
        slow("qwen3_5", "3"),
        slow("qwen3_vl", "3"),
        slow("qwen3_vl_moe", "3"),
    ],
)
def test_two_ranks_train_as_one(trainer, tmp_path: Path, family: str, stage: str) -> None:
    """A frozen reference, sampling and updates, through weights that each rank holds a part of."""
    recorded = str(tmp_path / "rollouts.jsonl")
    steps = (*STEPS, "--tiny_family", family)
    one = trainer.main(tmp_path / "one", *steps, "--gradient_accumulation_steps", "2", "--record_rollouts", recorded)
    words = ("--gradient_accumulation_steps", "1", "--zero_stage", stage, "--replay_rollouts", recorded)
    two = trainer.ranks(tmp_path / "two", 2, *steps, *words)
    assert len(one) == len(two) == 5
    for ours, theirs in zip(two, one, strict=True):
        for name in COMPARED:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (ours["step"], name)


@pytest.mark.slow
def test_ranks_sample_from_partitioned_states_and_experts(trainer, tmp_path: Path) -> None:
    """Own answers on both ranks: what they recorded at the first step is what one plain rank draws."""
    steps = ("--phases", "grpo:1", "--model", "tiny", "--tiny_family", "qwen3_5_moe")
    files = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    trainer.main(tmp_path / "one", *steps, "--gradient_accumulation_steps", "2", "--record_rollouts", str(files[0]))
    words = ("--gradient_accumulation_steps", "1", "--zero_stage", "3", "--record_rollouts", str(files[1]))
    trainer.ranks(tmp_path / "two", 2, *steps, *words)
    one, two = (sorted(file.read_text().splitlines()) for file in files)
    assert one == two and one

"""Launched ranks with partitioned states against one plain process: the same prompts, answers, losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tempsamp_fast.run.checkpoint import latest_checkpoint

TWENTY_STEPS = ("--phases", "sft:5,tempsamp:15", "--shaping", "anchor", "--beta", "0.04", "--learning_rate", "1e-4")
COMPARED = ("loss", "policy/entropy", "policy/kl", "optim/grad_norm", "reward/on_policy_mean")


@pytest.fixture(scope="module")
def one_rank(trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Run folder, recorded answers and metrics of one rank that accumulates two prompts a step."""
    folder = tmp_path_factory.mktemp("one_rank")
    recorded = folder / "rollouts.jsonl"
    words = (*TWENTY_STEPS, "--gradient_accumulation_steps", "2", "--record_rollouts", str(recorded))
    return folder / "run", recorded, trainer.main(folder / "run", *words)


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder, step = latest_checkpoint(run)
    assert step == 20
    return dict(AutoModelForImageTextToText.from_pretrained(folder / "model").named_parameters())


def slow(*words: str) -> Any:
    return pytest.param(words, marks=pytest.mark.slow, id=" ".join(words))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "partitioning",
    [
        pytest.param(("2",), id="2"),
        *(slow("0"), slow("1"), slow("3"), slow("2", "--offload", "optimizer"), slow("3", "--offload", "all")),
    ],
)
def test_every_zero_stage_and_number_of_ranks_trains_as_one_plain_rank(
    trainer, one_rank, tmp_path: Path, partitioning: tuple[str, ...], num_ranks: int
) -> None:
    run, recorded, expected = one_rank
    accumulation = ("--gradient_accumulation_steps", str(2 // num_ranks))
    words = (*accumulation, "--replay_rollouts", str(recorded), "--zero_stage", *partitioning)
    start = trainer.launch if (partitioning, num_ranks) == (("2",), 2) else trainer.ranks
    rows = start(tmp_path / "run", num_ranks, *TWENTY_STEPS, *words)
    assert [row["step"] for row in rows] == list(range(20))
    for ours, theirs in zip(rows, expected, strict=True):
        for name in COMPARED:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (ours["step"], name)
    reference = weights(run)
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-3, atol=1e-4)

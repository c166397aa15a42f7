"""Launched ranks with partitioned states against one plain process: the same prompts, answers, losses and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tempsamp_fast.run.checkpoint import latest_checkpoint

WORDS = ("--shaping", "anchor", "--beta", "0.04", "--learning_rate", "1e-4")
FIVE_STEPS, TWENTY_STEPS = "sft:1,tempsamp:4", "sft:5,tempsamp:15"
COMPARED = ("loss", "policy/entropy", "policy/kl", "optim/grad_norm", "reward/on_policy_mean")


@pytest.fixture(scope="module")
def one_rank(trainer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, list]]:
    """By phases: run folder, recorded answers and metrics of one rank that accumulates two prompts a step."""

    @cache
    def run(phases: str) -> tuple[Path, Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp("one_rank")
        recorded = folder / "rollouts.jsonl"
        words = ("--gradient_accumulation_steps", "2", "--record_rollouts", str(recorded), "--phases", phases)
        return folder / "run", recorded, trainer.main(folder / "run", *WORDS, *words)

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder, _ = latest_checkpoint(run)
    return dict(AutoModelForImageTextToText.from_pretrained(folder / "model").named_parameters())


STAGES = [("0",), ("1",), ("2",), ("3",), ("2", "--offload", "optimizer"), ("3", "--offload", "all")]


@pytest.mark.parametrize(
    ("phases", "partitioning", "num_ranks"),
    [
        pytest.param(FIVE_STEPS, ("2",), 2, id="few steps"),
        *(pytest.param(TWENTY_STEPS, stage, n, marks=pytest.mark.slow) for stage in STAGES for n in (1, 2)),
    ],
)
def test_every_zero_stage_and_number_of_ranks_trains_as_one_plain_rank(
    trainer, one_rank, tmp_path: Path, phases: str, partitioning: tuple[str, ...], num_ranks: int
) -> None:
    run, recorded, expected = one_rank(phases)
    accumulation = ("--gradient_accumulation_steps", str(2 // num_ranks))
    words = (*accumulation, "--replay_rollouts", str(recorded), "--zero_stage", *partitioning, "--phases", phases)
    start = trainer.launch if (phases, partitioning, num_ranks) == (TWENTY_STEPS, ("2",), 2) else trainer.ranks
    rows = start(tmp_path / "run", num_ranks, *WORDS, *words)
    assert [row["step"] for row in rows] == list(range(5 if phases == FIVE_STEPS else 20))
    for ours, theirs in zip(rows, expected, strict=True):
        for name in COMPARED:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (ours["step"], name)
    reference = weights(run)
    for name, weight in weights(tmp_path / "run").items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("phases", "words", "num_ranks"),
    [
        pytest.param(FIVE_STEPS, ("--zero_stage", "2"), 2, id="few steps"),
        *(
            pytest.param(TWENTY_STEPS, ("--zero_stage", stage, *more), n, marks=pytest.mark.slow)
            for stage, more, n in [("0", (), 2), ("1", ("--freeze_vision", "True"), 2), ("3", (), 2), ("2", (), 4)]
        ),
    ],
)
def test_ranks_that_share_rows_train_as_one_plain_rank(
    trainer, one_rank, tmp_path: Path, phases: str, words: tuple[str, ...], num_ranks: int
) -> None:
    """Rows of all ranks of a group, one after the other, each by all of them: supervised, sampled, with a reference."""
    accumulation = lambda number: ("--gradient_accumulation_steps", str(number))
    steps = [*WORDS, "--phases", phases]
    if num_ranks == 2 and "--freeze_vision" not in words:
        _, recorded, expected = one_rank(phases)
        steps += ["--replay_rollouts", str(recorded)]
    else:
        expected = trainer.main(tmp_path / "plain", *steps, *accumulation(num_ranks), *words[2:])
    together = ("--sequence_parallel_size", "2")
    rows = trainer.ranks(tmp_path / "run", num_ranks, *steps, *accumulation(2 // min(2, num_ranks)), *together, *words)
    assert len(rows) == len(expected)
    for ours, theirs in zip(rows, expected, strict=True):
        assert num_ranks > 2 or ours["batch/idle_share"] < 0.01
        for name in COMPARED:
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (ours["step"], name)


def test_the_launcher_starts_the_trainer(trainer, tmp_path: Path) -> None:
    """By the file, as the README does, which puts the file's folder first on the path."""
    (row,) = trainer.launch(tmp_path / "run", 1, "--phases", "sft:1")
    assert row["loss"] > 0 and latest_checkpoint(tmp_path / "run")[1] == 1

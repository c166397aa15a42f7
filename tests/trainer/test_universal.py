"""A run that is resumed on another number of ranks is the run that kept its own: optimizer states are converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

START, REST = ("--phases", "sft:3"), ("--phases", "sft:6")


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return trainer.main(tmp_path_factory.mktemp("undisturbed") / "run", *REST)


def on(num_ranks: int) -> tuple[str, ...]:
    """As many prompts a step whatever the number of ranks."""
    return "--gradient_accumulation_steps", str(2 // num_ranks)


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        pytest.param("2", 1, 2),
        *(
            pytest.param(stage, before, 3 - before, marks=pytest.mark.slow)
            for stage, before in [("0", 1), ("0", 2), ("1", 1), ("1", 2), ("2", 2), ("3", 1), ("3", 2)]
        ),
    ],
)
def test_a_run_resumed_on_another_number_of_ranks_goes_on_alike(
    trainer, undisturbed, tmp_path: Path, stage: str, before: int, after: int
) -> None:
    run = tmp_path / "run"
    trainer.ranks(run, before, *START, *on(before), "--zero_stage", stage)
    rows = trainer.ranks(run, after, *REST, *on(after), "--resume", str(run))
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed] == list(range(6))
    for ours, theirs in zip(rows, undisturbed, strict=True):
        for name in ("loss", "optim/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)
    assert not (run / "universal").exists()

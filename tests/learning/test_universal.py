"""A run that is resumed on another number of ranks is the run that kept its own: optimizer states are converted."""

from __future__ import annotations

from pathlib import Path

import pytest

START, REST = ("--phases", "sft:2"), ("--phases", "sft:3")


def on(num_ranks: int) -> tuple[str, ...]:
    """As many prompts a step whatever the number of ranks."""
    return "--gradient_accumulation_steps", str(2 // num_ranks)


CASES = [
    *((before, ("--zero_stage", stage)) for before in (1, 2) for stage in "0123"),
    *((before, ("--zero_stage", stage, "--lora_rank", "4")) for before, stage in ((1, "2"), (2, "3"))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "words"), CASES, ids=lambda part: part if isinstance(part, int) else " ".join(part))
def test_a_run_resumed_on_another_number_of_ranks_goes_on_alike(
    trainer, tmp_path: Path, before: int, words: tuple[str, ...]
) -> None:
    undisturbed, run, after = trainer.main(tmp_path / "undisturbed", *REST, *words), tmp_path / "run", 3 - before
    trainer.ranks(run, before, *START, *on(before), *words)
    rows = trainer.ranks(run, after, *REST, *on(after), *words, "--resume", str(run))
    assert [row["step"] for row in rows] == [row["step"] for row in undisturbed] == [0, 1, 2]
    for ours, theirs in zip(rows, undisturbed, strict=True):
        for name in ("loss", "optim/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)
    assert not (run / "universal").exists()

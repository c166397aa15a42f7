"""Steps skipped one after the other are counted, and a step that is taken begins anew."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tempsamp_fast.config import parse_phases
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.run.skipped_steps import SkippedSteps

FINE, BAD = 1.0, math.nan


def note(skipped: SkippedSteps, norms: list[float]) -> list[float]:
    steps = plan(parse_phases(f"sft:{len(norms)}"))
    metrics = [{"optim/grad_norm": norm} for norm in norms]
    for at, each in zip(steps, metrics, strict=True):
        skipped.note(at, [], each)
    return [each["optim/step_skipped"] for each in metrics]


@pytest.mark.parametrize("norms", [[BAD, BAD, FINE, BAD, BAD, FINE], [FINE, BAD, FINE, BAD, FINE, BAD, FINE, BAD]])
def test_skipped_steps_that_do_not_follow_each_other_do_not_add_up(tmp_path: Path, norms: list[float]) -> None:
    found = note(SkippedSteps(tmp_path, 0, 2), norms)
    assert found == [float(norm is BAD) for norm in norms]
    assert len(list((tmp_path / "skipped_steps").iterdir())) == sum(found)


@pytest.mark.parametrize("allowed", [0, 1, 2])
@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_one_more_in_a_row_than_allowed_ends_the_run(tmp_path: Path, allowed: int, norm: float) -> None:
    """Its dump is written all the same."""
    skipped = SkippedSteps(tmp_path, 1, allowed)
    note(skipped, [norm] * allowed + [FINE] + [norm] * allowed)
    with pytest.raises(FloatingPointError, match=rf"{allowed + 1} times in a row \(max_skipped_steps={allowed}\)"):
        note(skipped, [norm])
    assert (tmp_path / "skipped_steps/step_000000_rank_1.json").is_file()


def test_only_steps_skipped_one_after_the_other_end_the_run(tmp_path: Path) -> None:
    """With two allowed in a row: two, a good step, two again go on, and a third in a row ends it."""
    steps, skipped = list(plan(parse_phases("sft:9"))), SkippedSteps(tmp_path, rank=3, max_in_a_row=2)
    for step, norm in zip(steps, [math.nan, math.inf, 1.0, -math.inf, math.nan], strict=False):
        metrics = {"optim/grad_norm": norm}
        skipped.note(step, [], metrics)
        assert metrics["optim/step_skipped"] == float(not math.isfinite(norm))
    with pytest.raises(FloatingPointError, match=r"step 5: .* 3 times in a row \(max_skipped_steps=2\)"):
        skipped.note(steps[5], [], {"optim/grad_norm": math.nan})
    names = sorted(path.name for path in (tmp_path / "skipped_steps").iterdir())
    assert names == [f"step_00000{step}_rank_3.json" for step in (0, 1, 3, 4, 5)]

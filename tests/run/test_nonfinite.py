"""Counting skipped steps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tempsamp_fast.config import Phase
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.run.skipped_steps import SkippedSteps

STEPS = list(plan([Phase("sft", ("answer",), 9)]))


def test_only_steps_skipped_one_after_the_other_end_the_run(tmp_path: Path) -> None:
    """With two allowed in a row: two, a good step, two again go on, and a third in a row ends it."""
    skipped = SkippedSteps(tmp_path, rank=3, max_in_a_row=2)
    for step, norm in zip(STEPS, [math.nan, math.inf, 1.0, -math.inf, math.nan], strict=False):
        metrics = {"optim/grad_norm": norm}
        skipped.note(step, [], metrics)
        assert metrics["optim/step_skipped"] == float(not math.isfinite(norm))
    with pytest.raises(FloatingPointError, match=r"step 5: .* 3 times in a row \(max_skipped_steps=2\)"):
        skipped.note(STEPS[5], [], {"optim/grad_norm": math.nan})
    names = sorted(path.name for path in (tmp_path / "skipped_steps").iterdir())
    assert names == [f"step_00000{step}_rank_3.json" for step in (0, 1, 3, 4, 5)]

"""Steps skipped because their loss or gradient was not finite: told, dumped, the end of the run when they persist."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.run.log import write_json
from tempsamp_fast.run.schedule import PhaseStep
from tempsamp_fast.system.files import own_folder


class SkippedSteps:
    """Counts skipped steps in a row; every rank sees the same.

    run: what went into such a step is written to RUN/skipped_steps/step_000012_rank_0.json.
    max_in_a_row: the step that makes it more ends the run.
    num_steps: of the run, whose last step ends it when none since the start was taken; None: nothing does.
    """

    def __init__(self, run: Path, rank: int, max_in_a_row: int, num_steps: int | None = None):
        self.run, self.rank, self.max_in_a_row, self.num_steps = run, rank, max_in_a_row, num_steps
        self.in_a_row = 0
        self.has_learned = False

    @property
    def is_in_vain(self) -> bool:
        """Whether steps were skipped, and none taken, since the start of this process."""
        return self.in_a_row > 0 and not self.has_learned

    def note(self, at: PhaseStep, groups: Sequence[RolloutGroup], metrics: dict[str, float]) -> None:
        """Look at the metrics of a step just taken; adds `optim/step_skipped`, 0 or 1.

        Raises FloatingPointError when more than `max_in_a_row` steps were skipped one after the other, or all of them.
        """
        is_skipped = not math.isfinite(metrics["optim/grad_norm"])
        self.in_a_row = self.in_a_row + 1 if is_skipped else 0
        self.has_learned |= not is_skipped
        metrics["optim/step_skipped"] = float(is_skipped)
        if not is_skipped:
            return
        folder = own_folder(self.run / "skipped_steps")
        path = folder / f"step_{at.step:06d}_rank_{self.rank}.json"
        write_json(path, {"step": at.step, "phase": str(at.phase), "metrics": metrics, "groups": _described(groups)})
        is_last = self.num_steps is not None and at.step == self.num_steps - 1
        if self.in_a_row > self.max_in_a_row or (is_last and not self.has_learned):
            never = "" if self.has_learned else ", in every step so far: look for NaN in the weights, and at --dtype"
            raise FloatingPointError(
                f"step {at.step}: the loss or gradient was not finite {self.in_a_row} times in a row "
                f"(max_skipped_steps={self.max_in_a_row}){never}; what went into the steps is in {folder}"
            )


def _described(groups: Sequence[RolloutGroup]) -> list[dict[str, object]]:
    return [
        {
            "sample_id": group.prompt.sample.sample_id,
            "mode": group.prompt.mode,
            "prompt_tokens": len(group.prompt.input_ids),
            "advantages": None if group.advantages is None else group.advantages.tolist(),
            "answers": [
                {"tokens": len(each.ids), "rewards": each.rewards, "is_off_policy": each.is_off_policy}
                for each in group.completions
            ],
        }
        for group in groups
    ]

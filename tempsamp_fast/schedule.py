"""The plan of a run: which optimizer step belongs to which phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tempsamp_fast.config import Phase


@dataclass(frozen=True)
class PhaseStep:
    """One optimizer step of the plan."""

    step: int
    """Counted over the whole run, from 0."""
    phase: Phase
    phase_index: int
    step_in_phase: int

    @property
    def is_last_of_phase(self) -> bool:
        return self.step_in_phase == self.phase.num_steps - 1


def plan(phases: Sequence[Phase], first_step: int = 0) -> Iterator[PhaseStep]:
    """Every optimizer step from `first_step` on."""
    step = 0
    for phase_index, phase in enumerate(phases):
        for step_in_phase in range(phase.num_steps):
            if step >= first_step:
                yield PhaseStep(step, phase, phase_index, step_in_phase)
            step += 1

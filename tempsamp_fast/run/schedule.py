"""The plan of a run: which optimizer step belongs to which phase."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tempsamp_fast.config import Phase, TrainConfig, prompts_per_step


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


def in_steps(phases: Sequence[Phase], train: TrainConfig, num_samples: int, world_size: int) -> list[Phase]:
    """The phases with the steps of those that are given in epochs counted, the last step of an epoch full."""
    return [
        phase
        if phase.num_epochs is None
        else dataclasses.replace(
            phase, num_steps=math.ceil(phase.num_epochs * num_samples / prompts_per_step(train, phase, world_size))
        )
        for phase in phases
    ]


def plan(phases: Sequence[Phase], first_step: int = 0) -> Iterator[PhaseStep]:
    """Every optimizer step from `first_step` on."""
    step = 0
    for phase_index, phase in enumerate(phases):
        for step_in_phase in range(max(first_step - step, 0), phase.num_steps):
            yield PhaseStep(step + step_in_phase, phase, phase_index, step_in_phase)
        step += phase.num_steps


def first_reinforcement_step(phases: Sequence[Phase]) -> int | None:
    """The first step whose method is not `sft`; None without one."""
    step = 0
    for phase in phases:
        if phase.method != "sft" and phase.num_steps:
            return step
        step += phase.num_steps
    return None

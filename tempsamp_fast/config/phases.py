"""Phases of a run: which method trains for how many steps, asked in which modes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.sample import Mode

Method = Literal["sft", "grpo", "tempsamp"]
METHODS: tuple[str, ...] = get_args(Method)
MODES: tuple[str, ...] = get_args(Mode)
PHASE = r"(\w+)(?:/([\w+]+))?:(?:(\d{1,9})|(\d{1,9}(?:\.\d{1,9})?)epochs?)(?:@(\d+(?:\.\d+)?(?:e[+-]?\d+)?))?"


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps with one method; prompts take its modes in turn."""

    method: Method
    modes: tuple[Mode, ...]
    num_steps: int
    """0 until `schedule.in_steps` counts the steps of `num_epochs`."""
    learning_rate: float | None = None
    """Peak of this phase; None: the run's."""
    num_epochs: float | None = None

    def __str__(self) -> str:
        return f"{self.method}/{'+'.join(self.modes)}"


def parse_phases(text: str) -> list[Phase]:
    """Read `method[/mode[+mode]]:steps[@rate]` entries separated by commas, e.g. `sft:300@1e-5,grpo/think:1epoch`.

    Steps are a number of optimizer steps, or of epochs over the training samples. The mode defaults to `answer`, the
    rate to the run's. Raises ValueError that names the entry and the choices.
    """
    phases = []
    for entry in text.split(","):
        match = re.fullmatch(PHASE, entry.strip())
        if not match:
            raise ValueError(
                f"phases: {entry.strip()!r} is not method[/mode]:steps[@learning rate], such as tempsamp/think:150 or "
                "sft:2epochs"
            )
        method, modes = match[1], (match[2] or "answer").split("+")
        steps, epochs = int(match[3] or 0), float(match[4]) if match[4] else None
        if method not in METHODS:
            raise ValueError(f"phases: method {method!r} in {entry.strip()!r}; {choose_from(method, METHODS)}")
        for mode in modes:
            if mode not in MODES:
                raise ValueError(f"phases: mode {mode!r} in {entry.strip()!r}; {choose_from(mode, MODES)}")
        if steps < 1 and not epochs:
            raise ValueError(f"phases: {entry.strip()!r} has no steps")
        rate = float(match[5]) if match[5] else None
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"phases: {entry.strip()!r} has a learning rate of {rate}")
        phases.append(Phase(method, tuple(modes), steps, rate, epochs))  # type: ignore[arg-type]
    return phases

"""The sections of bench/gpu.py that run in one process, on models cut to two layers: that they come to their end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from bench import step_contenders
from bench.gpu_sections import attention, environment, micro, models, rollout, smoke, step, tuning, update
from bench.gpu_sections.child import Record
from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.scenarios.models import undrawn

DEPTH, LENGTH = 2, 4


@dataclass(frozen=True)
class Cut(models.Scale):
    """Published widths, two layers, weights as they come."""

    rounds: int = 1

    def config(self, size: models.Size, *, depth: int | None = None) -> Any:
        return super().config(size, depth=DEPTH)

    def model(
        self, size: models.Size, dtype: torch.dtype = torch.bfloat16, *, depth: int | None = None
    ) -> PreTrainedModel:
        with undrawn():
            return super().model(size, dtype, depth=depth)


def sections() -> dict[str, Callable[[Record], None]]:
    """Without TRL, which is not installed here, and without continuous batching, which has threads of its own."""
    scale = Cut()
    shapes = {"3B": (update.Shape(32, 8), update.Shape(32, 8, 2, True)), "7B": (update.Shape(32, 8),)}
    policy = lambda: rollout.Policy(scale.model("3B")).eval()
    return {
        "environment": environment.measure,
        "micro": micro.measure,
        "smoke": partial(smoke.measure, scale=scale),
        "tuning": partial(tuning.measure, heads=("7B",)),
        "attention": lambda record: attention.measure_cores(record, "7B", "7B", 32, 8),
        "update": partial(update.measure, scale=scale, shapes_of=shapes),
        "step": partial(step.measure, scale=scale, length=LENGTH),
        "rollout": lambda record: rollout.measure_videos(record, scale, policy(), 2, LENGTH),
    }


def generated(model: Any, prompt: Any, num_answers: int, length: int, *, copies: int = 1, **_: Any) -> torch.Tensor:
    """In place of transformers' `generate`, which `timezero` plays and which no value of a fake would end."""
    return torch.ones(copies * num_answers, length, dtype=torch.int64, device="cuda")


def play() -> None:
    """Whatever a section could not do is a violation, but for flex attention, which fakes have no rule for.

    Nobody knows a value, so that no check of one can fail; what sections measure beside ours may break the rules.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("bench.gpu_sections.") and hasattr(module, "require"):
                stack.enter_context(mock.patch.object(module, "require", lambda value, *_: value))
        for module in (rollout, step_contenders):
            stack.enter_context(mock.patch.object(module, "huggingface_generate", generated))
        stack.enter_context(mock.patch.object(step, "NUM_ANSWERS", (8,)))
        stack.enter_context(mock.patch.object(Record, "has", lambda *_: False))
        for name, measure in sections().items():
            record, before = Record(Path(folder) / f"{name}.json"), [*LEDGER.violations]
            with LEDGER.phase(f"build, section {name}"), record.attempt(name):
                measure(record)
            errors = [error for error in record.errors if "flex: NotImplementedError" not in error]
            LEDGER.violations[:] = before + [f"section {name}: {error}" for error in errors]
            if not record.rows:
                LEDGER.violations.append(f"section {name} has no rows")

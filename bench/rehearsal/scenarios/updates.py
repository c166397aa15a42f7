"""Forward and backward pass of the trainer's own loss, at full size, in the variants that a run may choose."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_sections.models import UNSTEPPED
from bench.gpu_sections.update import losses
from bench.rehearsal.ledger import LEDGER, PEAK_FLOPS
from bench.rehearsal.scenarios.models import CHECKPOINTS, GRID, Shape, model_of, rows_of
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import Config
from tempsamp_fast.model.architectures import count_parameters
from tempsamp_fast.model.flops import forward_flops
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.planning.estimate import Work, step_memory

ONE_PROMPT = Shape()
RECOMPUTED = {
    "": ["--gradient_checkpointing=false"],
    "tower": ["--gradient_checkpointing=true", "--checkpoint_every=1000"],
    "all": ["--gradient_checkpointing=true"],
}
"""Flags of the trainer by what is recomputed."""


@dataclass(frozen=True)
class Variant:
    """One way to run an update."""

    shape: Shape = ONE_PROMPT
    has_liger: bool = True
    recomputed: str = ""
    """One of `RECOMPUTED`."""
    has_frozen_tower: bool = False
    is_packed: bool = True

    def __str__(self) -> str:
        words = [f"C={self.shape.completion_len} G={self.shape.num_generations}"]
        words += [f"x{self.shape.num_groups}"] * (self.shape.num_groups > 1) + ["tree"] * self.shape.is_tree
        words += ["plain layers"] * (not self.has_liger) + ["frozen tower"] * self.has_frozen_tower
        words += [f"recomputed {self.recomputed}"] * bool(self.recomputed)
        return " ".join([*words, "packed" if self.is_packed else "unpacked"])

    def flags(self, size: str) -> list[str]:
        """The trainer's."""
        recomputed = RECOMPUTED[self.recomputed]
        frozen = ["--freeze_vision=true"] * self.has_frozen_tower
        layers = f"--liger_layers={'on' if self.has_liger else 'off'}"
        budget = [f"--prompts_per_device={self.shape.num_groups}", f"--max_tokens_per_row={10**9}"]
        return [
            "--phases=grpo:1",
            *UNSTEPPED,
            f"--model={CHECKPOINTS[size]}",
            layers,
            *budget,
            *recomputed,
            *frozen,
        ]


def play(size: str, variants: Sequence[Variant]) -> dict[str, Any]:
    """Figures by variant. Those without Liger's layers come first: layers that were switched stay so."""
    with LEDGER.phase(f"{size} build"):
        model = model_of(size)
    found: dict[str, Any] = {}
    for variant in sorted(variants, key=lambda each: each.has_liger):
        if variant.has_liger:
            apply_liger_layers(model, "on")
        config = parse_args(variant.flags(size)).model
        recomputes = {
            "gradient_checkpointing": config.gradient_checkpointing,
            "checkpoint_every": config.checkpoint_every,
        }
        policy = Policy(model, **recomputes).train()
        model.model.visual.requires_grad_(not variant.has_frozen_tower)
        policy.zero_grad()
        gc.collect()
        for parameter in policy.parameters():  # of the rows before this one
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        found[str(variant)] = _update(size, policy, variant)
    packed, unpacked = (found.get(str(Variant(is_packed=is_packed))) for is_packed in (True, False))
    if packed and unpacked:
        packed["over_unpacked"] = round(unpacked["cautious_ms"] / packed["cautious_ms"], 2)
    return found


def _update(size: str, policy: Policy, variant: Variant) -> dict[str, Any]:
    rows = rows_of(policy.config, variant.shape, variant.is_packed)
    times, rows = (1, rows) if variant.is_packed else (len(rows), rows[:1])  # rows of one answer are alike
    label = f"{size} {variant}"
    (row,) = [each.to("cuda") for each in rows]
    (run,) = losses(policy, [row])
    with LEDGER.phase(label) as whole:
        with LEDGER.phase(f"{label}: forward") as forward:
            loss = run()
        with LEDGER.phase(f"{label}: backward") as backward:
            loss.backward()
    del loss
    flops = times * 3 * forward_flops(row, policy.config)
    figures: dict[str, Any] = {"forward": forward.figures(), "backward": backward.figures()}
    for name, seconds in (("roofline", whole.roofline_s), ("cautious", whole.cautious_s)):
        figures[f"{name}_ms"] = round(1e3 * times * seconds, 1)
        figures[f"mfu_{name}"] = round(flops / (times * seconds) / PEAK_FLOPS, 3)
    figures |= {"model_flops": flops, "peak_gib": round(whole.peak / 2**30, 2)}
    if variant.is_packed:
        shape, prompt_len = variant.shape, row.layout[0].prompt_len
        queries = shape.num_groups if shape.is_tree else 1
        work = Work(GRID, prompt_len, shape.completion_len, shape.num_generations, shape.num_generations, queries)
        figures["planned_gib"] = planned_gib(work, policy.config, parse_args(variant.flags(size)))
    return figures


def planned_gib(work: Work, config: Any, settings: Config) -> float:
    """Weights, gradients and activations of one pass, as `tempsamp_fast.planning` has them."""
    parameters = count_parameters(config, settings.model)
    memory = step_memory(work, config, parameters, settings, 2, 1)
    return round((memory.weights + 2 * parameters.trained(settings.model) + memory.activations) / 2**30, 2)

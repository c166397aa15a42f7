"""Forward and backward of the trainer's own loss at real shapes: packed against one row per answer; no optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import Size, model_config, packed_rows, random_model
from bench.gpu_sections.timing import event_ms, in_turn, peak_flops, peak_gib, require
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.flops import forward_flops
from tempsamp_fast.liger_layers import apply_liger_layers
from tempsamp_fast.loss import RowTargets, policy_loss
from tempsamp_fast.packing import PackedRow
from tempsamp_fast.policy import Policy


@dataclass(frozen=True)
class Shape:
    """A micro-step: `num_groups` prompts of 3700 tokens, each with answers of equal length."""

    completion_len: int
    num_generations: int
    num_groups: int = 1

    def __str__(self) -> str:
        return f"C={self.completion_len} G={self.num_generations}" + f" x{self.num_groups}" * (self.num_groups > 1)


SHAPES: dict[Size, tuple[Shape, ...]] = {
    "3B": (Shape(32, 8), Shape(256, 8), Shape(32, 4), Shape(256, 4), Shape(32, 8, num_groups=4)),
    "7B": (Shape(32, 8), Shape(256, 8)),
}
ROUNDS = 4


def measure(record: Record) -> None:
    for size, shapes in SHAPES.items():
        with record.attempt(size):
            policy = Policy(random_model(model_config(size)))
            for shape in shapes:
                with record.attempt(f"{size} {shape}"):
                    measure_shape(record, f"{size} {shape}", policy, shape, is_goal=size == "3B")
            with record.attempt(f"{size} Liger layers"):
                measure_liger_layers(record, f"{size} {shapes[0]} Liger layers", policy, shapes[0])
            with record.attempt(f"{size} frozen tower"):
                measure_frozen_tower(record, f"{size} {shapes[0]} frozen tower", policy, shapes[0])
            del policy


def losses(policy: Policy, rows: Sequence[PackedRow]) -> list[Callable[[], Tensor]]:
    """One forward pass per row, all under the normaliser of the whole step."""
    num_answers = sum(row.num_completions for row in rows)
    advantages = torch.linspace(-1, 1, num_answers).split([row.num_completions for row in rows])
    num_tokens = sum(len(row.token_ids) for row in rows)
    algorithm = AlgorithmConfig(beta=0.0)
    passes = []
    for row, advantage in zip(rows, advantages, strict=True):
        targets = RowTargets(advantage, torch.zeros(len(advantage), dtype=torch.bool))
        head = policy_loss(row, targets, "grpo", algorithm, 1.0, num_answers, num_tokens, num_tokens)
        passes.append(partial(_loss, policy, row, head))
    return passes


def _loss(policy: Policy, row: PackedRow, head: Any) -> Tensor:
    return policy(row, head)[0]


def update(policy: Policy, passes: Sequence[Callable[[], Tensor]]) -> None:
    """Fresh gradients of all passes."""
    policy.zero_grad()
    for forward in passes:
        forward().backward()


def gradients(policy: Policy, passes: Sequence[Callable[[], Tensor]]) -> list[Tensor | None]:
    """On the CPU, parameter by parameter."""
    update(policy, passes)
    return [None if parameter.grad is None else parameter.grad.cpu() for parameter in policy.parameters()]


def gradient_distance(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Of all parameters as one vector; both sides must lack the same ones."""
    pairs = [(a.float(), b.float()) for a, b in zip(actual, expected, strict=True) if a is not None and b is not None]
    assert len(pairs) == sum(a is not None for a in actual) == sum(b is not None for b in expected)
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def phases(policy: Policy, rows: Sequence[PackedRow]) -> dict[str, float]:
    """Milliseconds of the tower alone, of the forward pass with it, and of the backward pass."""
    (forward,) = losses(policy, rows)
    (row,) = rows
    policy.zero_grad()
    results: list[Tensor] = []
    forward_ms = event_ms(lambda: results.append(forward()))
    backward_ms = event_ms(lambda: results.pop().backward())
    with torch.no_grad():
        tower_ms = event_ms(lambda: policy.encode_videos(row.pixel_values, row.video_grid_thw))
    return {"tower_forward_ms": tower_ms, "forward_ms": forward_ms, "backward_ms": backward_ms}


def measure_shape(record: Record, label: str, policy: Policy, shape: Shape, is_goal: bool) -> None:
    build = partial(
        packed_rows, policy.config, shape.completion_len, shape.num_generations, num_groups=shape.num_groups
    )
    rows = {"packed": build(), "unpacked": build(mode="none")}
    passes = {name: losses(policy, some) for name, some in rows.items()}
    error = gradient_distance(gradients(policy, passes["packed"]), gradients(policy, passes["unpacked"]))
    require(error, 0.1, "distance of the gradients, packed from unpacked")
    times = in_turn({name: partial(update, policy, some) for name, some in passes.items()}, rounds=ROUNDS, warmup=1)
    for name, figures in times.items():
        is_packed = name == "packed"
        record.add(
            f"{label} {name}",
            **figures,
            **mfu(policy, rows[name], figures["ms"]),
            **(phases(policy, rows[name]) if is_packed else {}),
            peak_gib=peak_gib(partial(update, policy, passes[name])),
            gradient_distance=error,
            over_unpacked=times["unpacked"]["ms"] / figures["ms"],
            goals=goals(shape) if is_packed and is_goal else None,
        )


def mfu(policy: Policy, rows: Sequence[PackedRow], ms: float) -> dict[str, float]:
    """Three times the forward FLOPs of the rows that ran, over the time and the peak; tokens per second."""
    flops = 3 * sum(forward_flops(row, policy.config) for row in rows)
    num_tokens = sum(row.num_tokens for row in rows)
    return {"mfu": 1e3 * flops / ms / peak_flops(), "tflop": flops / 1e12, "tokens_per_s": 1e3 * num_tokens / ms}


def goals(shape: Shape) -> dict[str, tuple[str, float]]:
    both = {"mfu": ("at least", 0.35)}
    return {**both, "over_unpacked": ("at least", 6.0)} if shape == Shape(32, 8) else both


def measure_frozen_tower(record: Record, label: str, policy: Policy, shape: Shape) -> None:
    """With the tower frozen and its features kept from the rollout, as the trainer runs on-policy."""
    policy.base_model.model.visual.requires_grad_(False)
    (row,) = packed_rows(policy.config, shape.completion_len, shape.num_generations)
    kept = replace(row, vision=policy.encode_videos(row.pixel_values, row.video_grid_thw))
    runs = {"pixels": [row], "features kept": [kept]}
    expected, actual = (gradients(policy, losses(policy, rows)) for rows in runs.values())
    error = require(gradient_distance(actual, expected), 1e-2, "distance of the gradients with kept features")
    times = in_turn({name: partial(update, policy, losses(policy, rows)) for name, rows in runs.items()}, rounds=ROUNDS)
    for name, figures in times.items():
        record.add(f"{label}, {name}", **figures, gradient_distance=error)


def measure_liger_layers(record: Record, label: str, policy: Policy, shape: Shape) -> None:
    """The trainer's default on a GPU against transformers' own layers, which every other row here runs."""
    fused = Policy(copy.deepcopy(policy.base_model))
    apply_liger_layers(fused.base_model, "on")
    rows = packed_rows(policy.config, shape.completion_len, shape.num_generations)
    policies = {"off": policy, "on": fused}
    expected, actual = (gradients(each, losses(each, rows)) for each in policies.values())
    error = require(gradient_distance(actual, expected), 0.1, "distance of the gradients with Liger's layers")
    runs = {name: partial(update, each, losses(each, rows)) for name, each in policies.items()}
    times = in_turn(runs, rounds=ROUNDS, warmup=1)
    for name, figures in times.items():
        record.add(
            f"{label} {name}",
            **figures,
            **mfu(policy, rows, figures["ms"]),
            peak_gib=peak_gib(runs[name]),
            gradient_distance=error,
        )

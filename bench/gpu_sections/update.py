"""Forward and backward of the trainer's own loss at real shapes: packed against one row per answer; no optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PLAIN_LAYERS, PUBLISHED, RECOMPUTED, Scale, Size
from bench.gpu_sections.timing import event_ms, in_turn, kernel_times, memory, require, share_of_peak
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning.loss import RowTargets, policy_loss
from tempsamp_fast.model.flops import forward_flops
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.packing import PackedRow
from tempsamp_fast.model.policy import Policy


@dataclass(frozen=True)
class Shape:
    """A micro-step: `num_groups` prompts, each with answers of equal length."""

    completion_len: int
    num_generations: int
    num_groups: int = 1
    is_recomputed: bool = False
    """Whether layers and vision blocks keep their inputs alone, on both sides."""

    def __str__(self) -> str:
        groups, recomputed = f" x{self.num_groups}" * (self.num_groups > 1), " recomputed" * self.is_recomputed
        return f"C={self.completion_len} G={self.num_generations}{groups}{recomputed}"

    @property
    def sizes(self) -> tuple[int, int]:
        return self.completion_len, self.num_generations


SHAPES: dict[Size, tuple[Shape, ...]] = {
    "3B": (Shape(32, 8), Shape(256, 8), Shape(32, 4), Shape(256, 4), Shape(32, 8, num_groups=4, is_recomputed=True)),
    "7B": (Shape(32, 8), Shape(256, 8), Shape(32, 8, is_recomputed=True)),
}


GOAL = Shape(32, 8)
"""Its packed row has both goals, and a profile."""
GRADIENT_BOUND = 0.2
"""Relative distance of bfloat16 gradients: in 36 layers rounding alone makes 0.05."""
PARTS = ("layers", "frozen tower")


def measure(
    record: Record,
    scale: Scale = PUBLISHED,
    shapes_of: Mapping[Size, Sequence[Shape]] = SHAPES,
    parts: Sequence[str] = PARTS,
) -> None:
    """parts: what of `PARTS` is measured after the shapes, of the first of them."""
    for size, shapes in shapes_of.items():
        with record.attempt(size):
            measure_size(record, scale, size, shapes, parts)


def measure_size(record: Record, scale: Scale, size: Size, shapes: Sequence[Shape], parts: Sequence[str]) -> None:
    config = scale.config(size)
    plain = scale.model(size)
    model = with_the_same_weights(plain)
    apply_liger_layers(model, "auto")
    fitting = [shape for shape in shapes if record.fits(f"{size} {shape}", needed_gib(scale, config, shape))]
    for shape in fitting:
        label = f"{size} {shape}"
        with record.attempt(label):
            is_goal = size == "3B" and not shape.is_recomputed
            measure_shape(record, scale, label, policy_of(model, shape), shape, is_goal)
    label, first = f"{size} {shapes[0]} Liger layers", shapes[0]
    if (
        "layers" in parts
        and record.has(label, "liger_kernel")
        and record.fits(label, needed_gib(scale, config, first, PLAIN_LAYERS))
    ):
        with record.attempt(label):
            measure_liger_layers(record, scale, label, plain, first)
    frozen = replace(shapes[0], is_recomputed=False)
    label = f"{size} {frozen} frozen tower"
    needed = scale.update_gib(config, *frozen.sizes, settings=["--freeze_vision=true"], copies=3)
    if "frozen tower" in parts and record.fits(label, needed):
        with record.attempt(label):
            measure_frozen_tower(record, scale, label, policy_of(model, frozen), frozen)


def needed_gib(scale: Scale, config: Any, shape: Shape, settings: Sequence[str] = ()) -> float:
    """With weights, gradients, and the gradients of another pass to compare them with."""
    recomputed = RECOMPUTED if shape.is_recomputed else ()
    every = [*settings, *recomputed]
    return scale.update_gib(config, *shape.sizes, num_groups=shape.num_groups, settings=every, copies=3)


def policy_of(model: PreTrainedModel, shape: Shape) -> Policy:
    """Around the same weights for every shape."""
    return Policy(model, gradient_checkpointing=shape.is_recomputed).train()


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


def gradients(policy: Policy) -> list[Tensor | None]:
    """Those of the last update, kept where they are."""
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in policy.parameters()]


def gradient_distance(policy: Policy, kept: Sequence[Tensor | None]) -> float:
    """Of the kept gradients from those of the last update, all as one vector; both must lack the same ones."""
    difference, total = [], []
    for parameter, other in zip(policy.parameters(), kept, strict=True):
        assert (parameter.grad is None) == (other is None)
        if parameter.grad is not None and other is not None:
            difference.append(torch.linalg.vector_norm(parameter.grad - other, dtype=torch.float32))
            total.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
    return (torch.stack(difference).norm() / torch.stack(total).norm()).item()


def compared(policies: Mapping[str, Policy], runs: Mapping[str, Callable[[], None]], bound: float) -> dict[str, Any]:
    """Under "error" the distance of two runs' gradients, which must be small, then memory by name, each from none.

    They may share parameters. Nothing needs to be warmed up after it.
    """
    first, second = runs
    runs[first]()
    kept = gradients(policies[first])
    runs[second]()
    error = require(gradient_distance(policies[second], kept), bound, f"distance of {first} from {second}")
    del kept
    found: dict[str, Any] = {"error": error}
    for name, run in runs.items():
        policies[name].zero_grad()
        found[name] = memory(run)
    return found


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


def measure_shape(record: Record, scale: Scale, label: str, policy: Policy, shape: Shape, is_goal: bool) -> None:
    """One group against a row per answer; several groups in one row against a row for each."""
    build = partial(scale.rows, policy.config, *shape.sizes, num_groups=shape.num_groups)
    other = "unpacked" if shape.num_groups == 1 else "row per group"
    rows = {"packed": build(), other: build(mode="none") if shape.num_groups == 1 else build(max_groups_per_row=1)}
    runs = {name: partial(update, policy, losses(policy, some)) for name, some in rows.items()}
    used = compared(dict.fromkeys(rows, policy), runs, GRADIENT_BOUND)
    times = in_turn(runs, rounds=scale.rounds, warmup=0)
    for name, figures in times.items():
        is_packed = name == "packed"
        record.add(
            f"{label} {name}",
            **figures,
            **mfu(policy, rows[name], figures["ms"]),
            **(phases(policy, rows[name]) if is_packed else {}),
            **used[name],
            gradient_distance=used["error"],
            **{f"over_{other.replace(' ', '_')}": times[other]["ms"] / figures["ms"]},
            goals=goals(shape) if is_packed and is_goal else None,
        )
    if is_goal and shape == GOAL:
        for name, figures in kernel_times(runs["packed"]).items():
            record.add(f"profile: {name}", **figures)


def mfu(policy: Policy, rows: Sequence[PackedRow], ms: float) -> dict[str, float | None]:
    """Three times the forward FLOPs of the rows that ran, over the time and the peak; tokens per second."""
    flops = 3 * sum(forward_flops(row, policy.config) for row in rows)
    num_tokens = sum(row.num_tokens for row in rows)
    return {"mfu": share_of_peak(flops, ms), "tflop": flops / 1e12, "tokens_per_s": 1e3 * num_tokens / ms}


def goals(shape: Shape) -> dict[str, tuple[str, float]]:
    both = {"mfu": ("at least", 0.4)}
    return {**both, "over_unpacked": ("at least", 7.0)} if shape == GOAL else both


def measure_frozen_tower(record: Record, scale: Scale, label: str, policy: Policy, shape: Shape) -> None:
    """With the tower frozen and its features kept from the rollout, as the trainer runs on-policy."""
    policy.base_model.model.visual.requires_grad_(False)
    policy.zero_grad()
    (row,) = scale.rows(policy.config, *shape.sizes)
    kept = replace(row, vision=policy.encode_videos(row.pixel_values, row.video_grid_thw))
    rows = {"pixels": [row], "features kept": [kept]}
    runs = {name: partial(update, policy, losses(policy, some)) for name, some in rows.items()}
    used = compared(dict.fromkeys(rows, policy), runs, 1e-2)
    for name, figures in in_turn(runs, rounds=scale.rounds, warmup=0).items():
        record.add(f"{label}, {name}", **figures, **used[name], gradient_distance=used["error"])


def with_the_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same parameters, whose layers may be changed."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def measure_liger_layers(record: Record, scale: Scale, label: str, plain: PreTrainedModel, shape: Shape) -> None:
    """The trainer's default on a GPU, which every other row here runs, against transformers' own layers."""
    fused = with_the_same_weights(plain)
    apply_liger_layers(fused, "on")
    policies = {"off": policy_of(plain, shape), "on": policy_of(fused, shape)}
    rows = scale.rows(plain.config, *shape.sizes, num_groups=shape.num_groups)
    runs = {name: partial(update, each, losses(each, rows)) for name, each in policies.items()}
    used = compared(policies, runs, GRADIENT_BOUND)
    times = in_turn(runs, rounds=scale.rounds, warmup=0)
    for name, figures in times.items():
        record.add(
            f"{label} {name}",
            **figures,
            **mfu(policies[name], rows, figures["ms"]),
            **used[name],
            gradient_distance=used["error"],
        )

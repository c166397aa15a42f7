"""Steps of the trainer's own parts in this process, 3B shape: random patches, sampled answers, DeepSpeed's ZeRO-1."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from bench.gpu_sections.child import Record
from bench.gpu_sections.job import SHAPE_3B, VARIANTS, needed_gib
from bench.gpu_sections.models import PUBLISHED, Scale
from bench.gpu_sections.timing import synchronize
from bench.step_contenders import NO_EOS, VIDEO
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.learning import update
from tempsamp_fast.learning.engine import build_engine
from tempsamp_fast.learning.vision_features import with_pixels_on, with_vision_features
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.system.stopwatch import Stopwatch

NUM_STEPS, NUM_WARMUP = 4, 1
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}


def measure(record: Record, scale: Scale = PUBLISHED, more: Sequence[str] = ()) -> None:
    """more: flags of the trainer."""
    for label, variant in VARIANTS.items():
        flags = ["--phases=grpo:1", *(word for word in SHAPE_3B if "synthetic" not in word), *variant, *more]
        if record.fits(label, needed_gib(flags)):
            with record.attempt(label):
                measure_steps(record, scale, f"trainer, {label}", flags)
            break


def measure_steps(record: Record, scale: Scale, label: str, flags: Sequence[str]) -> None:
    """Medians, after steps whose loss and gradient norm were finite."""
    config = parse_args(list(flags))
    model, frozen = scale.model("3B"), scale.model("3B").requires_grad_(False)
    for each in (model, frozen):
        apply_liger_layers(each, "auto")
    model.model.visual.requires_grad_(not config.model.freeze_vision)
    os.environ |= {name: value for name, value in ONE_RANK.items() if name not in os.environ}
    policy = Policy(model, gradient_checkpointing=config.model.gradient_checkpointing).train()
    engine = build_engine(policy, config.train, model.dtype)
    reference, backend = Policy(frozen).eval(), PolicyBackend(engine, **NO_EOS, max_tokens_per_row=10**9)
    prompts = with_pixels_on(
        engine.device, [scale.video_prompt(seed) for seed in range(config.train.prompts_per_device)]
    )
    sampling_s, updating_s = [], []
    for step in range(NUM_WARMUP + NUM_STEPS):
        began = _now()
        asked = with_vision_features(engine, prompts) if config.model.freeze_vision else prompts
        groups = sample(backend, asked, config, step)
        sampled = _now()
        metrics = update.update(engine, reference, groups, "grpo", config, len(prompts), 1e-6, Stopwatch())
        updating_s.append(_now() - sampled)
        sampling_s.append(sampled - began)
        for name in ("loss", "optim/grad_norm"):
            assert math.isfinite(metrics[name]), f"step {step}: {name} is {metrics[name]}"
    seconds = [a + b for a, b in zip(sampling_s, updating_s, strict=True)][NUM_WARMUP:]
    num_answers = len(prompts) * config.rollout.num_generations
    record.add(
        label,
        sampling_s=median(sampling_s[NUM_WARMUP:]),
        updating_s=median(updating_s[NUM_WARMUP:]),
        first_step_s=sampling_s[0] + updating_s[0],
        spread_s=[min(seconds), max(seconds)],
        rollouts_per_s=num_answers / median(seconds),
        gap=metrics.get("rollout/logp_gap"),
    )


def sample(backend: PolicyBackend, prompts: Sequence[Prompt], config: Any, step: int) -> list[RolloutGroup]:
    """Scored by nothing: advantages from -1 to 1 in the order of the answers."""
    count = config.rollout.num_generations
    params = SamplingParams(max_completion_length=config.rollout.max_completion_length)
    groups = []
    for prompt, answers in zip(prompts, backend.generate(prompts, count, params, (0, step)), strict=True):
        assert not any((answer.ids == VIDEO).any() for answer in answers)
        group = RolloutGroup(prompt, [Completion(each.ids, text="", sampled_logps=each.logps) for each in answers])
        group.advantages = torch.linspace(-1, 1, count)
        groups.append(group)
    return groups


def _now() -> float:
    synchronize()
    return time.perf_counter()

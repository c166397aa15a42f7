"""The whole step of the 3B shape, sampling to optimizer: against a TimeZero-style one with video, and TRL's on text."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from statistics import median

import torch

from bench import step_contenders as step
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PROMPT_LEN, model_config, on_gpu, random_model
from bench.gpu_sections.timing import in_turn, require
from tempsamp_fast.batch import Prompt, RolloutGroup
from tempsamp_fast.policy import Policy

NUM_ANSWERS, LENGTH, ROUNDS = 8, 32, 4
WIDE_GRID = (8, 28, 64)
"""3584 tokens of a video whose frames are wider than it is long: there transformers' positions agree with ours."""


def measure(record: Record) -> None:
    model = random_model(model_config("3B"))
    policy = Policy(model)
    # AdamW of bf16 parameters: the same small cost on every side.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    with record.attempt("TimeZero-style"):
        measure_against_plain_step(record, policy, optimizer)
    with record.attempt("TRL"):
        measure_against_trl(record, policy, optimizer)


@torch.no_grad()
def log_prob_distance(policy: Policy, gpu_prompt: Prompt, group: RolloutGroup) -> float:
    """Mean, between the packed forward pass and the plain one, whose log-softmax rounds to bf16."""
    answers = torch.stack([completion.ids for completion in group.completions]).cuda()
    expected = step.separate_log_probs(policy.base_model, gpu_prompt, answers)
    actual = step.packed_log_probs(policy, step.packed_row(policy, group))
    return (actual - expected.flatten().float()).abs().mean().item()


def measure_against_plain_step(record: Record, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    reference = Policy(random_model(model_config("3B"))).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    model, reference_model = policy.base_model, reference.base_model
    prompt = step.make_prompt(PROMPT_LEN, WIDE_GRID)
    gpu_prompt = on_gpu(prompt)
    group = step.random_group(prompt, LENGTH, NUM_ANSWERS)
    error = require(log_prob_distance(policy, gpu_prompt, group), 0.05, "mean distance of the log-probs")
    runs = {
        "ours": partial(step.packed_step, policy, reference, optimizer, prompt, NUM_ANSWERS, LENGTH),
        # With recomputation, without which eight rows of this length do not fit.
        "TimeZero-style": partial(
            step.plain_step, model, reference_model, optimizer, gpu_prompt, NUM_ANSWERS, LENGTH,
            gradient_checkpointing=True,
        ),
    }  # fmt: skip
    times = in_turn(runs, rounds=ROUNDS, warmup=1)
    for name, figures in times.items():
        record.add(
            f"video, {name}",
            **figures,
            over_plain_step=times["TimeZero-style"]["ms"] / figures["ms"],
            rollouts_per_s=1e3 * NUM_ANSWERS / figures["ms"],
            logp_distance=error,
            goals={"over_plain_step": ("at least", 5.0)} if name == "ours" else None,
        )


def synced_seconds() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def measure_against_trl(record: Record, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Same shape, prompt, answer length and sampling; beta 0, AdamW at 1e-6 and clipping at 1 on both sides."""
    prompt = step.make_prompt(PROMPT_LEN, (0, 0, 0))
    ours = partial(step.packed_step, policy, None, optimizer, prompt, NUM_ANSWERS, LENGTH)
    alternating = step.Alternating(ours, synced_seconds)
    with tempfile.TemporaryDirectory() as folder:
        step.trl_trainer(
            random_model(model_config("3B")), prompt, NUM_ANSWERS, LENGTH, alternating, folder=folder, rounds=ROUNDS,
            bf16=True, gradient_checkpointing=True,
        ).train()  # fmt: skip
    seconds = alternating.seconds
    for name, values in (("ours", seconds["ours_s"]), ("TRL", seconds["trl_s"])):
        record.add(
            f"text, {name}",
            ms=1e3 * median(values),
            spread_ms=[1e3 * min(values), 1e3 * max(values)],
            over_trl=median(seconds["trl_s"]) / median(values),
        )

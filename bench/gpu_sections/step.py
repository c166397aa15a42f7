"""The whole step of the 3B shape, sampling to optimizer: against a TimeZero-style one with video, and TRL's on text."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from bench import step_contenders as step
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PUBLISHED, RECOMPUTED, TOWER_RECOMPUTED, Scale
from bench.gpu_sections.rollout import LOGP_BOUND
from bench.gpu_sections.timing import in_turn, memory, require, synchronize
from tempsamp_fast.batch import Prompt, RolloutGroup
from tempsamp_fast.learning.vision_features import with_pixels_on
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder

LENGTH = 32
NUM_ANSWERS = (8, 4)
"""Fewer only where more do not fit."""


def measure(record: Record, scale: Scale = PUBLISHED, length: int = LENGTH) -> None:
    measure_video(record, scale, length)
    measure_text(record, scale, length)


def measure_video(record: Record, scale: Scale = PUBLISHED, length: int = LENGTH) -> None:
    """Against the TimeZero-style step."""
    model, optimizer = trained(scale)
    for num_answers in NUM_ANSWERS:
        label = f"video, G={num_answers}"
        if record.fits(label, needed_gib(scale, scale.config("3B"), length, num_answers)):
            with record.attempt(label):
                measure_against_plain_step(record, scale, label, model, optimizer, length, num_answers)
            break


def measure_text(record: Record, scale: Scale = PUBLISHED, length: int = LENGTH) -> None:
    """Against TRL's trainer."""
    label = "text, against TRL"
    # Weights and moments on both sides, the gradients of one at a time.
    needed = scale.update_gib(scale.config("3B"), length, NUM_ANSWERS[0], grid=(0, 0, 0), copies=7)
    if record.has(label, "trl", "datasets") and record.fits(label, needed):
        with record.attempt(label):
            measure_against_trl(record, scale, *trained(scale), length)


def trained(scale: Scale) -> tuple[PreTrainedModel, torch.optim.Optimizer]:
    """With the trainer's defaults on a GPU: a policy's tower attends by flash windows, in the plain step too.

    AdamW of bf16 parameters: the same small cost on every side.
    """
    model = scale.model("3B")
    apply_liger_layers(Policy(model).base_model, "auto")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def needed_gib(scale: Scale, config: Any, length: int, num_answers: int) -> float:
    """Weights, gradients, two moments and a reference; beside them our activations, or four times the plain logits.

    These are the log-softmax, its gradient by row, the rows stacked, and the first token's put back.
    """
    ours = scale.update_gib(config, length, num_answers, settings=TOWER_RECOMPUTED, copies=5)
    recomputed = scale.update_gib(config, length, 1, num_groups=num_answers, settings=RECOMPUTED, copies=5)
    logits = 2 * num_answers * (scale.prompt_len + length) * config.text_config.vocab_size / 2**30
    return max(ours, recomputed + 4 * logits)


@torch.no_grad()
def log_prob_distance(policy: Policy, on_device: Prompt, group: RolloutGroup) -> float:
    """Mean, between the packed forward pass and the plain one, whose log-softmax rounds to bf16."""
    answers = torch.stack([completion.ids for completion in group.completions]).to(on_device.input_ids.device)
    expected = step.separate_log_probs(policy.base_model, on_device, answers)
    actual = step.packed_log_probs(policy, step.packed_row(policy, group))
    return (actual - expected.flatten().float()).abs().mean().item()


def decoder_of(scale: Scale) -> Decoder:
    """The trainer's default."""
    return GraphDecoder() if scale.device == "cuda" else Decoder()


def our_step(
    sampler: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    prompt: Prompt,
    num_answers: int,
    length: int,
    decoder: Decoder,
    **recomputation: Any,
) -> None:
    """As the trainer runs it; which layers recompute is set anew, since the plain step ends by switching it off.

    sampler: the same policy in every step, as graphs are recorded for one.
    """
    policy = Policy(sampler.base_model, **recomputation).train()
    step.packed_step(policy, reference, optimizer, prompt, num_answers, length, decoder, sampler)


def measure_against_plain_step(
    record: Record,
    scale: Scale,
    label: str,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    length: int,
    num_answers: int,
) -> None:
    """Ours recomputes the vision tower, without which it does not fit into 80 GiB; the plain step every layer."""
    reference = Policy(scale.model("3B")).eval().requires_grad_(False)
    apply_liger_layers(reference.base_model, "auto")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    (prompt,) = with_pixels_on(model.device, [step.make_prompt(scale.prompt_len, scale.wide_grid)])
    on_device = scale.on_device(prompt)
    group = step.random_group(prompt, length, num_answers)
    error = require(log_prob_distance(Policy(model), on_device, group), LOGP_BOUND, "mean distance of the log-probs")
    num_layers, decoder = model.config.text_config.num_hidden_layers, decoder_of(scale)
    runs = {
        "ours": partial(
            our_step, Policy(model), reference, optimizer, prompt, num_answers, length, decoder,
            gradient_checkpointing=True, checkpoint_every=num_layers,
        ),
        "TimeZero-style": partial(
            step.plain_step, model, reference.base_model, optimizer, on_device, num_answers, length,
            gradient_checkpointing=True,
        ),
    }  # fmt: skip
    runs["ours"]()  # moments are there, graphs recorded and kernels compiled after it
    used = {name: memory(run) for name, run in runs.items()}
    times = in_turn(runs, rounds=scale.rounds, warmup=0)
    for name, figures in times.items():
        record.add(
            f"{label}, {name}",
            **figures,
            **used[name],
            over_plain_step=times["TimeZero-style"]["ms"] / figures["ms"],
            rollouts_per_s=1e3 * num_answers / figures["ms"],
            logp_distance=error,
            goals={"over_plain_step": ("at least", 8.0)} if name == "ours" else None,
        )


def synced_seconds() -> float:
    synchronize()
    return time.perf_counter()


def measure_against_trl(
    record: Record, scale: Scale, model: PreTrainedModel, optimizer: torch.optim.Optimizer, length: int
) -> None:
    """Same shape, prompt, answer length and sampling; beta 0, AdamW at 1e-6 and clipping at 1 on both sides."""
    prompt, num_answers = scale.text_prompt(), NUM_ANSWERS[0]
    ours = partial(our_step, Policy(model), None, optimizer, prompt, num_answers, length, decoder_of(scale))
    alternating = step.Alternating(ours, synced_seconds)
    with tempfile.TemporaryDirectory() as folder:
        step.trl_trainer(
            scale.model("3B"), prompt, num_answers, length, alternating, folder=folder, rounds=scale.rounds,
            bf16=True, gradient_checkpointing=True, use_cpu=scale.device == "cpu",
        ).train()  # fmt: skip
    seconds = alternating.seconds
    for name, values in (("ours", seconds["ours_s"]), ("TRL", seconds["trl_s"])):
        record.add(
            f"text, {name}",
            ms=1e3 * median(values),
            spread_ms=[1e3 * min(values), 1e3 * max(values)],
            over_trl=median(seconds["trl_s"]) / median(values),
        )

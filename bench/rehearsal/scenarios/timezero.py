"""A whole step of one prompt: ours with the trainer's defaults on a GPU, and one in the style of TimeZero.

The latter repeats pixels and prompt for every answer, keeps full logits and recomputes every layer; its tower attends
by flash windows and its patches are one product, as ours are.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench import step_contenders as step
from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.scenarios import rollouts
from bench.rehearsal.scenarios.models import model_of, prompt_of
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.video import normalise_rows

NUM_ANSWERS, GENERATED = 8, 3
"""Answers of a step; tokens that the other side generates here, of which each after the first costs the same."""


class EnoughError(Exception):
    """Ends a generation that nothing else would."""


def play(size: str, length: int) -> dict[str, Any]:
    """Cautious milliseconds of both steps by part, and their ratio. length: of the answers, in tokens."""
    with LEDGER.phase(f"{size} build"):
        model, reference = model_of(size), model_of(size).requires_grad_(False)
    other = plain_step(f"{size} TimeZero-style", Policy(model).base_model, Policy(reference).base_model, length)
    for each in (model, reference):
        each.gradient_checkpointing_disable()
        apply_liger_layers(each, "on")
    ours = our_step(f"{size} ours", model, Policy(reference).eval(), length)
    total = {name: sum(parts.values()) for name, parts in (("ours", ours), ("TimeZero-style", other))}
    return {
        "ours_ms": {name: round(ms, 1) for name, ms in ours.items()},
        "timezero_ms": {name: round(ms, 1) for name, ms in other.items()},
        "ms": round(total["ours"], 1),
        "rollouts_per_s": round(1e3 * NUM_ANSWERS / total["ours"], 2),
        "step_over_timezero": round(total["TimeZero-style"] / total["ours"], 2),
    }


def our_step(label: str, model: PreTrainedModel, reference: Policy, length: int) -> dict[str, float]:
    """Sampling with graphs, the tower recomputed."""
    num_layers = model.config.text_config.num_hidden_layers
    policy = Policy(model, gradient_checkpointing=True, checkpoint_every=num_layers)
    figures = rollouts.sample(label, policy.eval(), rollouts.Case(1, True))
    policy.train()
    prompt = prompt_of(policy.config)
    row = step.packed_row(policy, step.random_group(prompt, length, NUM_ANSWERS))
    with LEDGER.phase(f"{label}: reference and forward") as forward:
        loss = step.packed_loss(policy, reference, row)
    with LEDGER.phase(f"{label}: backward") as backward:
        loss.backward()
    del loss
    optimized = optimize(label, model)
    return {
        "rollout": 1e3 * rollouts.seconds(figures, length),
        "reference and forward": 1e3 * forward.cautious_s,
        "backward": 1e3 * backward.cautious_s,
        "optimizer": optimized,
    }


def plain_step(label: str, model: PreTrainedModel, reference: PreTrainedModel, length: int) -> dict[str, float]:
    prompt = prompt_of(model.config)
    pixels = normalise_rows(prompt.video.pixel_values.to("cuda"), geometry_of(model.config), torch.bfloat16)
    on_card = step_prompt(prompt, pixels)
    generate_ms = generation(label, model, on_card, length)
    answers = torch.stack([each.ids for each in step.random_group(prompt, length, NUM_ANSWERS).completions]).to("cuda")
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with LEDGER.phase(f"{label}: reference and forward") as forward:
        loss = step.separate_loss(model, reference.eval(), on_card, answers)
    with LEDGER.phase(f"{label}: backward") as backward:
        loss.backward()
    del loss
    return {
        "rollout": generate_ms,
        "reference and forward": 1e3 * forward.cautious_s,
        "backward": 1e3 * backward.cautious_s,
        "optimizer": optimize(label, model),
    }


def step_prompt(prompt: Any, pixels: Tensor) -> Any:
    """The prompt on the card, as plain calls of transformers take it."""
    return replace(prompt, input_ids=prompt.input_ids.to("cuda"), video=replace(prompt.video, pixel_values=pixels))


def generation(label: str, model: PreTrainedModel, prompt: Any, length: int) -> float:
    """Cautious milliseconds of `generate`: the prefill, and `length - 1` decoded tokens as dear as those played."""
    parts: list[ExitStack] = []
    names: list[str] = []

    def before(*_: Any) -> None:
        if len(names) == GENERATED:
            raise EnoughError
        names.append(f"{label}: {'decode' if names else 'prefill'}")
        parts.append(ExitStack())
        parts[-1].enter_context(LEDGER.phase(names[-1]))

    hooks = [
        model.register_forward_pre_hook(before),
        model.register_forward_hook(lambda *_: parts.pop().close()),
    ]
    try:
        with suppress(EnoughError):
            step.huggingface_generate(model, prompt, NUM_ANSWERS, GENERATED + 1)
    finally:
        for hook in hooks:
            hook.remove()
    prefill, decode = (LEDGER.phases[f"{label}: {name}"] for name in ("prefill", "decode"))
    return 1e3 * (prefill.cautious_s + (length - 1) * decode.cautious_s / (GENERATED - 1))


def optimize(label: str, model: nn.Module) -> float:
    """Cautious milliseconds of clipping and AdamW in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    with LEDGER.phase(f"{label}: optimizer") as phase:
        step.finish(model, optimizer)
    return 1e3 * phase.cautious_s

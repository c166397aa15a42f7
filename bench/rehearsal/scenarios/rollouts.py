"""Sampling with and without CUDA graphs, with answers that all run to the end or that end and retire on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.rehearsal.ledger import LEDGER, Phase
from bench.rehearsal.scenarios.models import model_of, prompt_of
from bench.step_contenders import NO_EOS
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import decoding, generate
from tempsamp_fast.rollout.kv_cache import SharedPrefixCache
from tempsamp_fast.rollout.token_sampling import SamplingParams

NUM_ANSWERS, LENGTH = 8, 4
END, SHARE_THAT_ENDS = 5, 0.3
PARTS = {
    "prefill": (generate, "_prefill"),
    "cache": (SharedPrefixCache, "__init__"),
    "decode": (decoding.Decoder, "__call__"),
    "decode, graphs": (decoding.GraphDecoder, "__call__"),
    "record": (decoding, "record_cuda_graph"),
    "append": (generate._Answers, "append"),
    "retire": (SharedPrefixCache, "retire"),
}


@dataclass(frozen=True)
class Case:
    """Prompts sampled together, `NUM_ANSWERS` answers each."""

    num_prompts: int
    has_graphs: bool
    ends: bool = False
    """Whether answers end on the way."""

    def __str__(self) -> str:
        graphs = ", graphs" * self.has_graphs
        return f"{self.num_prompts} prompts{graphs}{', rows end' * self.ends}"


def play(size: str, cases: Sequence[Case]) -> dict[str, Any]:
    """Figures by case."""
    with LEDGER.phase(f"{size} build"):
        model = model_of(size)
    apply_liger_layers(model, "on")
    policy = Policy(model).eval()
    return {str(case): sample(size, policy, case) for case in cases}


def sample(size: str, policy: Policy, case: Case) -> dict[str, Any]:
    """Of a rollout by part, and of a decoded token: everything between one token and the next."""
    prompts = [prompt_of(policy.config, seed) for seed in range(case.num_prompts)]
    label = f"{size} rollout, {case}"
    options: dict[str, Any] = {"eos_token_ids": [END], "banned_token_ids": []} if case.ends else NO_EOS
    with LEDGER.phase(label) as whole, parts_of(label), chosen(label, SHARE_THAT_ENDS if case.ends else 0.0):
        answers = generate.generate(
            policy, prompts, NUM_ANSWERS, SamplingParams(max_completion_length=LENGTH), seed=(0,),
            cuda_graphs=case.has_graphs, **options,
        )  # fmt: skip
    assert case.ends or {len(each.ids) for group in answers for each in group} == {LENGTH}
    phases = {name: LEDGER.phases[f"{label}: {name}"] for name in ("prefill", "cache", "choose", "append")}
    decode = LEDGER.phases[f"{label}: {'decode, graphs' if case.has_graphs else 'decode'}"]
    recorded = LEDGER.phases.get(f"{label}: record", Phase("none"))
    num_steps = LENGTH - 1
    total = lambda name: (
        (getattr(decode, name) - getattr(recorded, name)) / num_steps
        + (getattr(phases["choose"], name) + getattr(phases["append"], name)) / LENGTH
    )
    waits = sum(sum(phase.waits.values()) for phase in (decode, phases["choose"], phases["append"]))
    waits -= sum(recorded.waits.values())
    return {
        "prefill": phases["prefill"].figures(),
        "cache": phases["cache"].figures(),
        "record_ms": round(1e3 * recorded.cautious_s, 1),
        "launches_per_token": round(total("launches"), 1),
        "waits_per_token": round(waits / LENGTH, 2),
        "flops_per_token": total("flops"),
        "decode_roofline_ms_per_token": round(1e3 * total("roofline_s"), 2),
        "decode_ms_per_token": round(1e3 * total("cautious_s"), 2),
        "peak_gib": round(whole.peak / 2**30, 2),
    }


def seconds(figures: dict[str, Any], length: int) -> float:
    """Cautious, of a rollout of so many tokens an answer, the recording of a graph included."""
    once = figures["prefill"]["cautious_ms"] + figures["cache"]["cautious_ms"] + figures["record_ms"]
    return (once + length * figures["decode_ms_per_token"]) / 1e3


@contextmanager
def parts_of(label: str) -> Iterator[None]:
    """Inside, each of `PARTS` has books of its own."""
    with ExitStack() as stack:
        for name, (owner, attribute) in PARTS.items():
            wrapped = within(f"{label}: {name}", getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, wrapped))
        yield


def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, booked as a phase."""

    @functools.wraps(function)
    def booked(*args: Any, **kwargs: Any) -> Any:
        with LEDGER.phase(name):
            return function(*args, **kwargs)

    return booked


@contextmanager
def chosen(label: str, share_that_ends: float) -> Iterator[None]:
    """Inside, sampled tokens have true values, of which a share ends the answer."""
    choose, generator = generate.choose_tokens, torch.Generator().manual_seed(0)

    def drawn(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with LEDGER.phase(f"{label}: choose"):
            tokens, logps = choose(*args, **kwargs)
        ids = torch.randint(10, 1000, tokens.shape, generator=generator)
        ids[torch.rand(tokens.shape, generator=generator) < share_that_ends] = END
        tokens.true_values = ids  # type: ignore[attr-defined]
        return tokens, logps

    with mock.patch.object(generate, "choose_tokens", drawn):
        yield

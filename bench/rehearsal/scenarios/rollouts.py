"""Sampling with and without CUDA graphs, with answers that all run to the end or that end and retire on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bench.rehearsal.ledger import LEDGER, Phase
from bench.rehearsal.scenarios.models import model_of, prompt_of
from bench.step_contenders import NO_EOS
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import decoding, generate
from tempsamp_fast.rollout.answers import Answers
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.kv_cache import DecodeCache
from tempsamp_fast.rollout.token_sampling import SamplingParams

NUM_ANSWERS, LENGTH = 8, 4
SHARE_THAT_ENDS = 0.3
PARTS = {
    "prefill": (generate, "_prefill"),
    "cache": (DecodeCache, "begin"),
    "decode": (decoding.Decoder, "__call__"),
    "decode, graphs": (decoding.GraphDecoder, "__call__"),
    "record": (decoding, "record_cuda_graph"),
    "read": (Answers, "finished"),
    "select": (DecodeCache, "select"),
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


def sample(size: str, policy: Policy, case: Case, decoder: Decoder | None = None) -> dict[str, Any]:
    """Of a rollout by part, and of a decoded token: everything between one token and the next.

    decoder: of rollouts before this one.
    """
    prompts = [prompt_of(policy.config, seed) for seed in range(case.num_prompts)]
    label = f"{size} rollout, {case}"
    decoder = decoder or (GraphDecoder() if case.has_graphs else Decoder())
    with LEDGER.phase(label) as whole, ends(SHARE_THAT_ENDS if case.ends else 0.0), parts_of(label):
        generate.generate(
            policy, prompts, NUM_ANSWERS, SamplingParams(max_completion_length=LENGTH), seed=(0,), decoder=decoder,
            **NO_EOS,
        )  # fmt: skip
    phases = {name: LEDGER.phases[f"{label}: {name}"] for name in ("prefill", "cache", "read")}
    decode = LEDGER.phases[f"{label}: {'decode, graphs' if case.has_graphs else 'decode'}"]
    recorded = LEDGER.phases.get(f"{label}: record", Phase("none"))
    per_token = lambda value: (value(decode) - value(recorded) + value(phases["read"])) / (LENGTH - 1)
    return {
        "prefill": phases["prefill"].figures(),
        "cache": phases["cache"].figures(),
        "record_ms": round(1e3 * recorded.cautious_s, 1),
        "launches_per_token": round(per_token(lambda phase: phase.launches), 1),
        "waits_per_token": round(per_token(lambda phase: sum(phase.waits.values())), 2),
        "flops_per_token": per_token(lambda phase: phase.flops),
        "decode_roofline_ms_per_token": round(1e3 * per_token(lambda phase: phase.roofline_s), 2),
        "decode_ms_per_token": round(1e3 * per_token(lambda phase: phase.cautious_s), 2),
        "peak_gib": round(whole.peak / 2**30, 2),
    }


def seconds(figures: dict[str, Any], length: int) -> float:
    """Cautious, of a rollout of so many tokens an answer; graphs are recorded once a run."""
    once = figures["prefill"]["cautious_ms"] + figures["cache"]["cautious_ms"]
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
def ends(share: float) -> Iterator[None]:
    """Inside, this share of the answers that still run ends with every token."""
    finished, generator = Answers.finished, torch.Generator().manual_seed(0)

    def read(answers: Answers) -> list[bool]:
        finished(answers)
        if share:
            answers.is_finished.true_values |= torch.rand(len(answers.is_finished), generator=generator) < share
        return answers.is_finished.true_values.tolist()

    with mock.patch.object(Answers, "finished", read):
        yield

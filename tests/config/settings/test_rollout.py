"""Settings of sampling off their defaults, each where it is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempsamp_fast.rollout import backends
from tempsamp_fast.rollout import vllm as vllm_backend
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.rollout.vllm import VllmBackend
from tempsamp_fast.run.schedule import plan


class Sampler:
    """Stands in for a rollout backend: notes what it is asked for, and answers with one number, another every time."""

    def __init__(self, run: Any) -> None:
        self.asked: list[tuple[list[int], SamplingParams, tuple[int, ...]]] = []
        self.run = run

    def sync_weights(self) -> None:
        """There are none."""

    def generate(self, prompts: Sequence, num_completions: Any, params: SamplingParams, seed: Any) -> list:
        self.asked.append((list(num_completions), params, tuple(seed)))
        texts = (f"{len(self.asked)}{prompt}{index}" for prompt, n in enumerate(num_completions) for index in range(n))
        ids = [self.run.chat.encode(text) for text in texts]
        answers = iter(SampledAnswer(each, torch.zeros(len(each))) for each in ids)
        return [[next(answers) for _ in range(n)] for n in num_completions]


def test_the_sampler_is_asked_as_settings_say(stepper: Callable) -> None:
    """The off-policy answer counts among `num_generations`; evaluation is greedy whatever the temperature."""
    words = ("--num_generations", "5", "--temperature", "0.7", "--top_p", "0.9", "--top_k", "3", "--seed", "6")
    run = stepper("--phases", "grpo:1,tempsamp:1", *words, "--max_completion_length", "9").run
    run.backend = sampler = Sampler(run)
    groups = [run.answer(at, run.prompts(at)) for at in plan(run.phases)]
    drawn = SamplingParams(temperature=0.7, top_p=0.9, top_k=3, max_completion_length=9)
    assert sampler.asked == [([5, 5], drawn, (6, 0)), ([4, 4], drawn, (6, 1))]
    assert {len(group.completions) for of_step in groups for group in of_step} == {5}
    run.greedy(run.prompts(next(plan(run.phases))), [1, 1])
    assert sampler.asked[2][1] == SamplingParams(temperature=0.0, top_p=0.9, top_k=3, max_completion_length=9)


def test_policy_sampler_and_reference_read_one_temperature(stepper: Callable) -> None:
    """Their log-probs of the sampled tokens agree at it, before and after an update of almost nothing."""
    words = ("--gradient_accumulation_steps", "1", "--max_completion_length", "4", "--learning_rate", "1e-12")
    words += ("--updates_per_batch", "2", "--max_logp_gap", "0")
    one = stepper("--phases", "tempsamp:2", "--temperature", "0.7", "--beta", "0.1", *words)
    first, second = plan(one.run.phases)
    groups = one.groups(first)
    metrics = one.run.update(first, groups)
    assert metrics["rollout/logp_gap"] < 1e-5 and abs(metrics["policy/kl"]) < 1e-8
    assert metrics["policy/ratio_min"] == pytest.approx(1, abs=1e-5) == metrics["policy/ratio_max"]
    one.run.config.rollout.temperature, one.run.config.algorithm.updates_per_batch = 1.0, 1
    assert one.run.update(second, groups)["rollout/logp_gap"] > 1e-2


def test_recorded_answers_are_replayed_in_place_of_sampled_ones(stepper: Callable, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    recording = stepper("--phases", "grpo:1", "--record_rollouts", str(path)).run
    replaying = stepper("--phases", "grpo:1", "--replay_rollouts", str(path)).run
    answers = []
    for run in (recording, replaying):
        run.backend = Sampler(run)
        at = next(plan(run.phases))
        groups = run.answer(at, run.prompts(at))
        answers.append([each.ids.tolist() for group in groups for each in group.completions])
    assert answers[0] == answers[1] == [ids for line in path.open() for ids in json.loads(line)["ids"]]
    assert len(recording.backend.asked) == 1 and not replaying.backend.asked


def test_vllm_samples_when_asked_for_within_the_memory_given(
    stepper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(vllm_backend, "colocated_llm", lambda *arguments: made.append(arguments))
    words = ("--rollout_backend", "vllm", "--vllm_memory", "0.45", "--max_tokens_per_row", "999", "--seed", "4")
    run = stepper("--phases", "grpo:1", *words, "--task", "multi_grounding").run
    assert made == [(run.policy, run.chat, 999 + 12, 0.45, 4)]
    assert isinstance(run.backend, VllmBackend) and run.backend._task == "multi_grounding"
    assert isinstance(stepper("--phases", "grpo:1").run.backend, PolicyBackend)


def test_cuda_graphs_reach_the_decoding_passes(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU a run that asks for them is refused."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(backends, "generate", lambda *_, **given: options.append(given))
    engine = SimpleNamespace(module="policy", zero_optimization_partition_weights=lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        for graphs in (True, False, None):
            PolicyBackend(engine, [1], [2, 3], 77, graphs).generate([], 1, SamplingParams(), (0,))
    decoders = [type(each.pop("decoder")) for each in options]
    assert decoders == [GraphDecoder, Decoder, GraphDecoder]
    common = {"eos_token_ids": [1], "banned_token_ids": [2, 3], "max_tokens_per_row": 77, "seed": (0,), "synced": False}
    assert options == [common] * 3
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda_graphs=True needs a CUDA GPU"):
            stepper("--phases", "grpo:1", "--cuda_graphs", "True")

"""Rollouts by vLLM, against an in-process double of its documented interface: vLLM itself needs a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.generate import SampledAnswer, SamplingParams
from tempsamp_fast.rollout.vllm import VllmBackend, colocated_llm
from tests.rollout import vllm_double

EOS, BANNED = 7, [5, 6]
GREEDY = SamplingParams(temperature=0, max_completion_length=6)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9, top_k=20, max_completion_length=6)


def ids(answers: list[list[SampledAnswer]]) -> list[list[list[int]]]:
    return [[answer.ids.tolist() for answer in group] for group in answers]


class Setting:
    """A policy in a double of an engine, and vLLM's double started from an earlier checkpoint of it."""

    def __init__(self, tiny, folder: Path) -> None:
        tiny.model().save_pretrained(folder)
        self.prompts: list[Prompt] = [group.prompt for group in tiny.groups()]
        policy = Policy(tiny.model())
        self.engine = SimpleNamespace(module=policy, global_steps=0, zero_optimization_partition_weights=lambda: False)
        self.chat = SimpleNamespace(
            end_token_ids=[EOS],
            banned_token_ids=BANNED,
            timestamps_in_text=tiny.family != "qwen2_5_vl",
            unexpanded=self._unexpanded,
        )
        self.llm = colocated_llm(str(folder), torch.float32, 500, 0.3, seed=0)
        self.backend = VllmBackend(self.engine, self.chat, "grounding", self.llm)
        self.own = PolicyBackend(self.engine, [EOS], BANNED, 10_000)

    def _unexpanded(self, sample, mode, task) -> torch.Tensor:
        whole = next(prompt.input_ids for prompt in self.prompts if prompt.sample is sample)
        return torch.cat([whole[:4], torch.tensor([62, 61, 63]), whole[-4:]])

    def train(self) -> None:
        """An optimizer step that turns answers around."""
        with torch.no_grad():
            for parameter in self.engine.module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.engine.global_steps += 1


@pytest.fixture
def setting(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    vllm_double.install(monkeypatch)
    return Setting(tiny, tmp_path)


def test_answers_are_those_of_the_policy_after_every_update(setting: Setting) -> None:
    """Weights of the tower and the language model are synced, and nothing computed with the old ones is used."""
    seen = []
    for _ in range(2):
        setting.backend.sync_weights()
        answers = setting.backend.generate(setting.prompts, 2, GREEDY, seed=(0, 1))
        assert ids(answers) == ids(setting.own.generate(setting.prompts, 2, GREEDY, seed=(0, 1)))
        seen.append(ids(answers))
        setting.train()
    assert seen[0] != seen[1]


def test_without_an_update_nothing_is_copied(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(setting.llm, "apply_model", lambda function: copies.append(1))
    setting.backend.sync_weights()
    setting.backend.sync_weights()
    assert len(copies) == 1
    setting.train()
    setting.backend.sync_weights()
    assert len(copies) == 2


def test_sampling_parameters_reach_vllm_and_log_probs_come_back(setting: Setting) -> None:
    setting.backend.sync_weights()
    answers = setting.backend.generate(setting.prompts, [3, 1, 2], SAMPLED, seed=(0, 1))
    assert [len(group) for group in answers] == [3, 1, 2]
    for answer in (each for group in answers for each in group):
        assert answer.logps.dtype == torch.float32 and len(answer.logps) == len(answer.ids) <= 6
        assert not {60, 61, *BANNED} & set(answer.ids.tolist())
    first = setting.llm.requests[0]
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (1.2, 0.9, 20, 6)
    assert first.stop_token_ids == [EOS] and set(first.logit_bias) == {60, 61, *BANNED}
    again = setting.backend.generate(setting.prompts, [3, 1, 2], SAMPLED, seed=(0, 2))
    seeds = [request.seed for request in setting.llm.requests]
    assert len(set(seeds)) == 6 and ids(again) != ids(answers)


def test_features_at_hand_are_not_computed_again(setting: Setting) -> None:
    setting.backend.sync_weights()
    expected = setting.backend.generate(setting.prompts, 1, GREEDY, seed=(0,))
    policy = setting.engine.module
    kept = []
    for prompt in setting.prompts:
        features = policy.encode_videos(prompt.video.pixel_values, torch.tensor([prompt.video.grid_thw]))
        kept.append(replace(prompt, video=replace(prompt.video, pixel_values=torch.empty(0, 0), features=features)))
    assert ids(setting.backend.generate(kept, 1, GREEDY, seed=(0,))) == ids(expected)


def test_prompts_that_vllm_reads_differently_are_refused(setting: Setting) -> None:
    setting.llm.extra_ids = [9]
    with pytest.raises(ValueError, match=r"sample-1.*ids and the trainer as .*index 0 on"):
        setting.backend.generate(setting.prompts[:1], 1, GREEDY, seed=(0,))


def test_partitioned_parameters_are_refused(setting: Setting) -> None:
    setting.engine.zero_optimization_partition_weights = lambda: True
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        VllmBackend(setting.engine, setting.chat, "grounding", setting.llm)


def test_adapters_are_refused(setting: Setting) -> None:
    policy = setting.engine.module

    class Wrapped(nn.Module):
        get_base_model = staticmethod(lambda model=policy.model: model)

    policy.model = Wrapped()
    with pytest.raises(ValueError, match="LoRA"):
        VllmBackend(setting.engine, setting.chat, "grounding", setting.llm)


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"tempsamp-fast\[vllm\]"):
        colocated_llm("folder", torch.float32, 500, 0.3, seed=0)

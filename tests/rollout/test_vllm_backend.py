"""Rollouts by vLLM, against an in-process double of it; `test_vllm_engine.py` meets vLLM itself."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning.loss import log_probs
from tempsamp_fast.model.mrope import temporal_positions
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.backends import PolicyBackend
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.rollout.vllm import VllmBackend, _second_per_grid, colocated_llm
from tests.conftest import Tiny
from tests.rollout import vllm_double

EOS, BANNED = 7, [5, 6]
GREEDY = SamplingParams(temperature=0, max_completion_length=6)
SAMPLED = SamplingParams(temperature=1.2, top_p=0.9, top_k=20, max_completion_length=6)


def ids(answers: list[list[SampledAnswer]]) -> list[list[list[int]]]:
    return [[answer.ids.tolist() for answer in group] for group in answers]


class Setting:
    """A policy in a double of an engine, and vLLM's double."""

    def __init__(self, tiny, is_tied: bool = True, max_tokens: int = 500) -> None:
        self.prompts: list[Prompt] = [group.prompt for group in tiny.groups()]
        model = tiny.model()
        if not is_tied:
            model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
        policy = Policy(model)
        self.engine = SimpleNamespace(module=policy, global_steps=0, zero_optimization_partition_weights=lambda: False)
        self.chat = SimpleNamespace(
            end_token_ids=[EOS],
            banned_token_ids=BANNED,
            timestamps_in_text=tiny.family != "qwen2_5_vl",
            tokenizer=SimpleNamespace(save_pretrained=lambda folder: None),
            unexpanded=self._unexpanded,
        )
        self.llm = colocated_llm(policy, self.chat, max_tokens, 0.3, seed=0)
        self.backend = VllmBackend(self.engine, self.chat, "grounding", self.llm)
        self.own = PolicyBackend(self.engine, [EOS], BANNED, 10_000)

    def _unexpanded(self, sample, mode, task) -> torch.Tensor:
        whole = next(prompt.input_ids for prompt in self.prompts if prompt.sample is sample)
        video = [61] if self.chat.timestamps_in_text else [62, 61, 63]
        return torch.cat([whole[:4], torch.tensor(video), whole[-4:]])

    def train(self, of: str = "") -> None:
        """An optimizer step on the parameters with `of` in their names that turns answers around."""
        with torch.no_grad():
            for name, parameter in self.engine.module.named_parameters():
                if of in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        self.engine.global_steps += 1

    def with_features(self) -> list[Prompt]:
        """The prompts without pixels, but with what the tower makes of them now."""
        encode, kept = self.engine.module.encode_videos, []
        for prompt in self.prompts:
            features = encode(prompt.video.pixel_values, torch.tensor([prompt.video.grid_thw]))
            video = replace(prompt.video, pixel_values=torch.empty(0, 0), features=features.map(torch.Tensor.detach))
            kept.append(replace(prompt, video=video))
        return kept


@pytest.fixture
def setting(tiny, monkeypatch: pytest.MonkeyPatch) -> Setting:
    vllm_double.install(monkeypatch)
    return Setting(tiny)


@pytest.mark.parametrize("is_tied", [True, False])
def test_answers_are_those_of_the_policy_after_every_update(
    tiny, is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the language model and its head are synced, and nothing computed with the old ones is used."""
    vllm_double.install(monkeypatch)
    setting, seen = Setting(tiny, is_tied), []
    for _ in range(2):
        setting.backend.sync_weights()
        answers = setting.backend.generate(setting.prompts, 2, GREEDY, seed=(0, 1))
        assert ids(answers) == ids(setting.own.generate(setting.prompts, 2, GREEDY, seed=(0, 1)))
        seen.append(ids(answers))
        setting.train()
    assert seen[0] != seen[1]


def test_features_of_a_frozen_tower_outlive_an_update(setting: Setting) -> None:
    """Reloading weights empties the worker's encoder cache, and the scheduler must not count on it."""
    prompts = setting.with_features()
    for _ in range(2):
        setting.backend.sync_weights()
        answers = setting.backend.generate(prompts, 1, GREEDY, seed=(0,))
        assert ids(answers) == ids(setting.own.generate(prompts, 1, GREEDY, seed=(0,)))
        setting.train(of="language_model")


def test_prompts_that_fill_more_than_a_pass_are_not_cut(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM cannot draw a seeded answer to a prompt that it reads in parts."""
    vllm_double.install(monkeypatch)
    setting = Setting(tiny, max_tokens=40)
    assert sum(len(prompt.input_ids) for prompt in setting.prompts) > 40
    setting.backend.sync_weights()
    assert len(setting.backend.generate(setting.prompts, 1, SAMPLED, seed=(0,))) == 3


def test_videos_that_differ_in_their_times_alone_are_told_apart(setting: Setting) -> None:
    """Still frames have the same features however far apart they are."""
    first = setting.prompts[2]
    other = replace(first.video, second_per_grid=0.5, timestamps_s=first.video.timestamps_s + 20)
    if setting.chat.timestamps_in_text:
        ids_ = [id_ + 20 * (next_ == 62) for id_, next_ in zip(first.input_ids, [*first.input_ids[1:], 0], strict=True)]
        later = replace(
            first, video=other, sample=replace(first.sample, sample_id="later"), input_ids=torch.tensor(ids_)
        )
    else:
        later = replace(first, video=other, sample=replace(first.sample, sample_id="later"))
    setting.prompts.append(later)
    for prompts in ([first], [later]):
        setting.backend.sync_weights()
        answers = setting.backend.generate(prompts, 1, GREEDY, seed=(0,))
        own = setting.own.generate(prompts, 1, GREEDY, seed=(0,))
        assert ids(answers) == ids(own)
        torch.testing.assert_close(answers[0][0].logps, own[0][0].logps, rtol=0, atol=1e-5)


def test_log_probs_are_the_models_own(setting: Setting) -> None:
    """At temperature 1 and over all ids, whatever answers are drawn at; a tenth of the vocabulary is banned here."""
    setting.backend.sync_weights()
    answers = setting.backend.generate(setting.prompts, 2, SAMPLED, seed=(0, 1))
    policy = setting.engine.module
    for prompt, group in zip(setting.prompts, answers, strict=True):
        (row,) = pack(
            [RolloutGroup(prompt, [Completion(answer.ids, "") for answer in group])],
            config=policy.config,
            max_tokens_per_row=1000,
        )
        logps = policy(row, log_probs(row, AlgorithmConfig(), 1.0))
        torch.testing.assert_close(torch.cat([answer.logps for answer in group]), logps, rtol=0, atol=1e-5)


def test_the_number_of_threads_stays_as_it_was_and_can_be_changed(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a CPU leaves one thread, and a `torch.set_num_threads` that does nothing."""
    before = torch.get_num_threads()
    vllm_double.install(monkeypatch)
    try:
        torch.set_num_threads(3)
        Setting(tiny)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_vllm_rounds_times_to_the_positions_of_the_trainer(caplog: pytest.LogCaptureFixture) -> None:
    """At frame rates whose times fall below a whole position in float64, which vLLM takes, and on it in float32."""
    config = Tiny("qwen2_5_vl").model().config
    rate = config.vision_config.tokens_per_second

    def are_equal(seconds: float, ours: torch.Tensor) -> bool:
        of_vllm = (torch.arange(60).double() * (seconds * rate)).long()
        assert int((of_vllm - ours).abs().max()) <= 1
        return torch.equal(of_vllm, ours)

    short, num_equal, num_equal_as_it_is = Tiny("qwen2_5_vl").prompt((1, 2, 2)), 0, 0
    for number in range(1, 400):
        prompt = replace(short, video=replace(short.video, grid_thw=(60, 2, 2), second_per_grid=number / 100))
        ours = temporal_positions(60, number / 100, config)
        num_equal += are_equal(_second_per_grid(prompt, config), ours)
        num_equal_as_it_is += are_equal(number / 100, ours)
    assert num_equal == 394 and num_equal_as_it_is < 370
    assert caplog.text.count("one position off") == 5


def test_without_an_update_nothing_is_copied(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(setting.llm, "collective_rpc", lambda method, kwargs: copies.append(method))
    setting.backend.sync_weights()
    setting.backend.sync_weights()
    assert copies == ["reload_weights"]
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


def test_a_sample_that_is_asked_in_both_modes_draws_other_numbers_in_each(setting: Setting) -> None:
    setting.backend.sync_weights()
    first = setting.prompts[0]
    setting.backend.generate([first, replace(first, mode="think"), first], 1, SAMPLED, seed=(0, 1))
    answer, think, again = (request.seed for request in setting.llm.requests)
    assert answer == again != think


def test_features_at_hand_are_not_computed_again(setting: Setting) -> None:
    setting.backend.sync_weights()
    expected = setting.backend.generate(setting.prompts, 1, GREEDY, seed=(0,))
    assert ids(setting.backend.generate(setting.with_features(), 1, GREEDY, seed=(0,))) == ids(expected)


def test_prompts_that_vllm_reads_differently_are_refused(setting: Setting) -> None:
    setting.llm.extra_ids = [9]
    with pytest.raises(ValueError, match=r"sample-1.*ids and the trainer as .*index 0 on"):
        setting.backend.generate(setting.prompts[:1], 1, GREEDY, seed=(0,))


def test_partitioned_parameters_are_refused(setting: Setting) -> None:
    setting.engine.zero_optimization_partition_weights = lambda: True
    with pytest.raises(ValueError, match="ZeRO stage 3"):
        VllmBackend(setting.engine, setting.chat, "grounding", setting.llm)


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"tempsamp-fast\[vllm\]"):
        colocated_llm(Policy(Tiny("qwen3_vl").model()), SimpleNamespace(), 500, 0.3, seed=0)

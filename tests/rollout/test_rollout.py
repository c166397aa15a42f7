"""Rollouts against the plain model, and against themselves in other company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import generate as rollout
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.rollout.token_sampling import choose_tokens

EOS = 7
PARAMS = SamplingParams(temperature=1.3, max_completion_length=12)


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_completions: int | list[int] = 3,
    params: SamplingParams = PARAMS,
    **options,
) -> list[list[SampledAnswer]]:
    options = {"seed": (0, 5), "eos_token_ids": [EOS], **options}
    return generate(policy, prompts, num_completions, params, **options)


def prompts_of(tiny) -> list[Prompt]:
    return [group.prompt for group in tiny.groups()]


def same_ids(left: Sequence[SampledAnswer], right: Sequence[SampledAnswer]) -> bool:
    return [answer.ids.tolist() for answer in left] == [answer.ids.tolist() for answer in right]


def plain_next_logits(model: PreTrainedModel, prompt: Prompt, answer: Tensor) -> Tensor:
    """Logits [vocab] after the answer so far, by transformers' own forward over everything."""
    video = prompt.video
    positions, start = mrope_positions(prompt.input_ids, [video.grid_thw], [video.second_per_grid], model.config)
    answer_positions = torch.arange(start, start + len(answer)).expand(3, -1)
    return model(
        input_ids=torch.cat([prompt.input_ids, answer])[None],
        position_ids=torch.cat([positions, answer_positions], dim=1)[:, None],
        pixel_values_videos=video.pixel_values,
        video_grid_thw=torch.tensor([video.grid_thw]),
        use_cache=False,
    ).logits[0, -1]


@torch.no_grad()
def test_greedy_answers_are_the_plain_models(tiny) -> None:
    model, prompts = tiny.model(), prompts_of(tiny)
    answers = sample(Policy(tiny.model()), prompts, 1, SamplingParams(temperature=0, max_completion_length=8))
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        expected = torch.empty(0, dtype=torch.int64)
        while len(expected) < 8 and EOS not in expected:
            logits = plain_next_logits(model, prompt, expected)
            logits[[60, 61]] = float("-inf")
            expected = torch.cat([expected, logits.argmax()[None]])
        assert answer.ids.tolist() == expected.tolist()


def test_sampled_log_probs_are_those_of_the_packed_training_forward(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    answers = sample(policy, prompts)
    groups = [
        RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in group])
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)
    with torch.no_grad():
        logits = policy(row, lambda hidden, weight: hidden @ weight.T) / PARAMS.temperature
    expected = logits.log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
    sampled = torch.cat([answer.logps for group in answers for answer in group])
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)


def test_answers_do_not_depend_on_their_company(tiny) -> None:
    """Alone, in another order, with more siblings, prefilled in several rows: the same tokens."""
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    together = sample(policy, prompts)
    assert len({tuple(answer.ids.tolist()) for group in together for answer in group}) == 9
    for prompt, group in zip(prompts, together, strict=True):
        assert same_ids(sample(policy, [prompt])[0], group)
        assert same_ids(sample(policy, [prompt], 5)[0][:3], group)
    assert all(map(same_ids, sample(policy, prompts[::-1]), together[::-1]))
    assert all(map(same_ids, sample(policy, prompts, max_tokens_per_row=60), together))


def test_prompts_may_ask_for_different_numbers_of_answers(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    expected = [group[:count] for group, count in zip(sample(policy, prompts), (3, 1, 2), strict=True)]
    assert all(map(same_ids, sample(policy, prompts, [3, 1, 2], max_tokens_per_row=60), expected))


def test_another_seed_step_or_mode_gives_other_answers(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    answers = sample(policy, prompts)[0]
    assert not same_ids(answers, sample(policy, prompts, seed=(0, 6))[0])
    assert not same_ids(answers, sample(policy, [replace(prompts[0], mode="think")])[0])


def test_answers_end_with_eos_or_at_the_limit(tiny) -> None:
    ends = [20, 21, 22, 23, 24]
    answers = [a for group in sample(Policy(tiny.model()), prompts_of(tiny), 8, eos_token_ids=ends) for a in group]
    assert {len(answer.ids) for answer in answers} > {1, PARAMS.max_completion_length}
    for answer in answers:
        assert len(answer.logps) == len(answer.ids)
        assert not set(answer.ids[:-1].tolist()) & set(ends)
        assert answer.ids[-1] in ends or len(answer.ids) == PARAMS.max_completion_length


@pytest.mark.parametrize("share", [0.0, 2.0], ids=["at_once", "never"])
def test_when_finished_rows_retire_changes_nothing(tiny, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts, ends = Policy(tiny.model()), prompts_of(tiny), list(range(20, 30))
    expected = sample(policy, prompts, 8, eos_token_ids=ends)
    monkeypatch.setattr("tempsamp_fast.rollout.decoding.RETIRE_SHARE", share)
    assert all(map(same_ids, sample(policy, prompts, 8, eos_token_ids=ends), expected))


def test_decoding_stops_with_the_last_row_and_drops_finished_ones(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    batch_sizes = []
    policy.base_model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: batch_sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    answers = sample(policy, prompts, 8, eos_token_ids=list(range(20, 40)))
    longest = max(len(answer.ids) for group in answers for answer in group)
    assert longest < PARAMS.max_completion_length
    assert len(batch_sizes) == longest
    assert batch_sizes[1:] == sorted(batch_sizes[1:], reverse=True) and batch_sizes[-1] < 24


def test_prefilling_attends_by_the_core_of_the_policy(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention runs on the CPU where no gradient is needed."""
    prompts, cores = prompts_of(tiny), []
    packed_attention = rollout.packed_attention
    note = lambda *args, core, **options: cores.append(core) or packed_attention(*args, core=core, **options)
    monkeypatch.setattr(rollout, "packed_attention", note)
    answers = sample(Policy(tiny.model(), attention_core="flex"), prompts)
    assert all(map(same_ids, answers, sample(Policy(tiny.model()), prompts)))
    assert cores == ["flex", "auto"]


def test_each_video_and_prompt_is_encoded_once(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    num_patches = []
    policy.base_model.model.visual.register_forward_pre_hook(lambda _, args: num_patches.append(len(args[0])))
    sample(policy, prompts, 6)
    assert num_patches == [sum(len(prompt.video.pixel_values) for prompt in prompts)]


def test_vision_placeholders_and_banned_ids_are_never_drawn(tiny) -> None:
    answers = sample(Policy(tiny.model()), prompts_of(tiny), 8, banned_token_ids=range(10, 60))
    drawn = {token for group in answers for answer in group for token in answer.ids.tolist()}
    assert drawn <= {*range(10), 62, 63} and len(drawn) > 3


def test_a_policy_that_prefers_placeholders_is_kept_from_them(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the two placeholders are opposite and all others zero: without the ban one of them wins every time."""
    model = tiny.model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 32))
    model.lm_head.weight.data[60], model.lm_head.weight.data[61] = torch.ones(32), -torch.ones(32)
    greedy = SamplingParams(temperature=0, max_completion_length=4)
    drawn = lambda: {t for group in sample(Policy(model), prompts_of(tiny), 1, greedy) for t in group[0].ids.tolist()}
    assert not drawn() & {60, 61}
    without_ban = lambda logits, params, uniforms, banned: choose_tokens(logits, params, uniforms)
    monkeypatch.setattr("tempsamp_fast.rollout.sampler.choose_tokens", without_ban)
    assert drawn() <= {60, 61}


def test_a_checkpointed_policy_in_training_mode_samples_the_same(tiny) -> None:
    """In evaluation mode, without the dropout of adapters; afterwards it trains again."""
    policy = Policy(tiny.model(), gradient_checkpointing=True).train()
    prompts, modes = prompts_of(tiny), []
    policy.base_model.model.language_model.layers[0].register_forward_pre_hook(
        lambda layer, _: modes.append(layer.training)
    )
    assert all(map(same_ids, sample(policy, prompts), sample(Policy(tiny.model()), prompts)))
    assert not any(modes) and modes and policy.training


def test_kept_vision_features_give_the_same_answers(tiny) -> None:
    model = tiny.model()
    model.model.visual.requires_grad_(False)
    policy, prompts = Policy(model), prompts_of(tiny)
    assert all(map(same_ids, sample(policy, with_vision_features(policy, prompts)), sample(policy, prompts)))


def test_synced_ranks_make_as_many_passes_as_the_busiest(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank, a double, needs 5 prefill rows and decodes up to the limit; this rank's answers stay its own."""
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    ends = list(range(20, 40))
    expected = sample(policy, prompts, 2, eos_token_ids=ends)
    longest = max(len(answer.ids) for group in expected for answer in group)
    assert longest < PARAMS.max_completion_length
    other_rank = iter([5, *[1] * PARAMS.max_completion_length])
    monkeypatch.setattr("tempsamp_fast.system.ranks.num_ranks", lambda: 2)
    monkeypatch.setattr(
        "tempsamp_fast.system.ranks.dist.all_reduce", lambda tensor, op: tensor.clamp_(min=next(other_rank))
    )
    calls = []
    policy.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = sample(policy, prompts, 2, eos_token_ids=ends, synced=True)
    assert all(map(same_ids, answers, expected))
    assert len(calls) == 5 + PARAMS.max_completion_length - 1


def test_a_prompt_longer_than_a_row_is_named(tiny) -> None:
    with pytest.raises(ValueError, match="sample-1"):
        sample(Policy(tiny.model()), prompts_of(tiny), max_tokens_per_row=10)


def test_logits_that_are_no_numbers_behind_the_first_token_name_the_sample(
    tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = lambda hidden, weight: torch.full((len(hidden), len(weight)), torch.nan)
    monkeypatch.setattr("tempsamp_fast.rollout.decoding.next_token_logits", nan)
    with pytest.raises(FloatingPointError, match=r"sample-.*logits are not finite"):
        sample(Policy(tiny.model()), prompts_of(tiny))


def test_no_prompts_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="prompts"):
        sample(Policy(tiny.model()), [])

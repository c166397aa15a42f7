"""Questions about one video are sampled from one prefill of it, with the answers that they have alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.generate import SamplingParams, generate

EOS = 7


def sample(policy: Policy, prompts: Sequence[Prompt], **options: Any) -> list[list[SampledAnswer]]:
    options = {"seed": (0, 5), "eos_token_ids": [EOS], **options}
    return generate(policy, prompts, [3, 1, 2, 2, 3, 1], SamplingParams(1.3, max_completion_length=12), **options)


def prompts_of(tiny) -> list[Prompt]:
    return [group.prompt for group in tiny.tree_groups()]


def apart(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each with a video of its own, the same to the bit."""
    return [replace(prompt, video=replace(prompt.video)) for prompt in prompts]


@pytest.mark.parametrize("max_tokens_per_row", [45, 10_000], ids=["part_of_a_tree", "one_row"])
def test_answers_are_those_of_prompts_with_videos_of_their_own(tiny, max_tokens_per_row: int) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    found = sample(policy, prompts, max_tokens_per_row=max_tokens_per_row)
    expected = sample(policy, apart(prompts))
    for ours, theirs in zip(found, expected, strict=True):
        assert [each.ids.tolist() for each in ours] == [each.ids.tolist() for each in theirs]
        for each, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(each.logps, other.logps, rtol=1e-5, atol=1e-5)


def test_log_probs_are_those_of_the_training_forward_over_the_tree(tiny) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    answers = sample(policy, prompts)
    groups = [
        RolloutGroup(prompt, [Completion(each.ids, text="") for each in of_prompt])
        for prompt, of_prompt in zip(prompts, answers, strict=True)
    ]
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)
    with torch.no_grad():
        logits = policy(row, lambda hidden, weight: hidden @ weight.T)
    expected = (logits / 1.3).log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
    logps = torch.cat([each.logps for of_prompt in answers for each in of_prompt])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_a_video_is_read_once_for_all_of_its_questions(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts = Policy(tiny.model()), prompts_of(tiny)
    lengths = []
    embed = policy.base_model.model.get_input_embeddings()
    embed.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    sample(policy, prompts)
    shared = 2 * (len(prompts[0].input_ids) - 3) + len(prompts[4].input_ids) - 1
    assert lengths[0] == sum(len(prompt.input_ids) for prompt in prompts) - shared

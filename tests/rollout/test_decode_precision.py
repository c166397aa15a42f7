"""Decoding in bfloat16 is as exact as training is: scores and logits are never rounded to bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decode_in_torch import attend
from tempsamp_fast.rollout.decoding import next_token_logits
from tempsamp_fast.rollout.generate import SamplingParams, generate


def attention_error(offset: float) -> float:
    """Largest error of attention in bfloat16 relative to its output, for keys with a common offset, as biases make."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    query, keys, values = draw(1, 2, 4, 64), draw(1, 2, 200, 64) + offset, draw(1, 2, 200, 64)
    query, keys, values = (tensor.bfloat16() for tensor in (query, keys, values))
    output, lse = attend(query, keys, values, 0.125)
    scores = query.double() @ keys.double().mT * 0.125
    expected = scores.softmax(-1) @ values.double()
    assert output.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    return float((output - expected).abs().max() / expected.abs().max())


def test_a_common_offset_of_the_scores_does_not_cost_precision() -> None:
    """Rounding the scores would: by 7 % and more."""
    plain, offset = attention_error(0.0), attention_error(40.0)
    assert plain < 0.01 and offset < 0.01


def test_logits_of_a_bfloat16_head_are_those_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (5, 300))
    logits: Tensor = next_token_logits(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def sampled_and_recomputed(tiny, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of 90 sampled tokens: the sampler's, those of the packed training forward, and of that in float32."""
    model = tiny.model().to(torch.bfloat16).to(dtype)
    policy, prompts = Policy(model), [group.prompt for group in tiny.groups()]
    params = SamplingParams(max_completion_length=10)
    answers = generate(policy, prompts, 3, params, seed=(0,), eos_token_ids=[])
    groups = [
        RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in group])
        for prompt, group in zip(prompts, answers, strict=True)
    ]
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)

    @torch.no_grad()
    def recomputed(policy: Policy) -> Tensor:
        return policy(row, next_token_logits).log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]

    own, exact = recomputed(policy), tiny.model().to(torch.bfloat16).float()
    return torch.cat([answer.logps for group in answers for answer in group]), own, recomputed(Policy(exact))


def test_log_probs_are_those_of_training_to_a_millionth(tiny) -> None:
    """On average; a single one of -4 may be off by what float32 makes of another order of sums."""
    sampled, recomputed, _ = sampled_and_recomputed(tiny, torch.float32)
    errors = (sampled - recomputed).abs()
    assert float(errors.mean()) < 1e-6 and float(errors.max()) < 5e-6


@pytest.mark.parametrize("tiny", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_in_bfloat16_sampling_is_no_further_from_float32_than_training(tiny) -> None:
    """On average over the tokens; a tenth is left to chance."""
    sampled, recomputed, exact = sampled_and_recomputed(tiny, torch.bfloat16)
    assert (sampled - exact).abs().mean() < 1.1 * (recomputed - exact).abs().mean()

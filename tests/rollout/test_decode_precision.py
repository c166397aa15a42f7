"""Decoding in bfloat16 is as exact as training is: scores and logits are never rounded to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from tempsamp_fast.rollout.decoding import next_token_logits
from tempsamp_fast.rollout.shared_keys import attend


def attention_error(offset: float) -> float:
    """Largest error of attention in bfloat16 relative to its output, for keys with a common offset, as biases make."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    query, keys, values = draw(1, 2, 4, 64), draw(1, 2, 200, 64) + offset, draw(1, 2, 200, 64)
    query, keys, values = (tensor.bfloat16() for tensor in (query, keys, values))
    bias = torch.zeros(200)
    output, lse = attend(query, keys, values, bias, 0.125)
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

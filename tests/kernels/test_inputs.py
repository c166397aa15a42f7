"""What a call is given: as many completions as tokens, empty completions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempsamp_kernels import fused_linear_grpo_loss, fused_selective_log_softmax, linear_logprob


def run(batch, **options):
    learned = batch.learned()
    given = {"old_logps": batch.old_logps, "ref_logps": batch.ref_logps, "impl": "torch", **options}
    loss, metrics = fused_linear_grpo_loss(*learned.inputs(), **given)
    loss.backward()
    return loss.detach(), learned.hidden.grad, metrics


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@settings(max_examples=3, deadline=None)
@given(lengths=st.lists(st.integers(0, 2), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_rows_of_any_length_mean_the_same_whether_given_per_completion_or_per_token(packed, impl, lengths, seed):
    """Empty completions too, and as many completions as tokens."""
    batch, num_rows = packed(lengths, seed=seed, masked=0.3), len(lengths)
    by_row = batch.advantages
    temperature = torch.linspace(0.5, 1.5, num_rows, device=by_row.device)
    common = {"is_off_policy": batch.is_off_policy, "mask": batch.mask, "num_rows": num_rows, "impl": impl}
    found = run(batch, advantages=by_row, temperature=temperature, **common)
    expected = run(batch, advantages=by_row[batch.row_ids], advantages_level="token", temperature=temperature, **common)
    torch.testing.assert_close(found[:2], expected[:2])


@pytest.mark.parametrize("known_by", [{"is_off_policy": True}, {"row_mask": True}, {"advantages_level": "row"}])
def test_as_many_completions_as_tokens_are_completions_where_something_says_so(packed, known_by):
    """Rows of 0, 1 and 3 tokens: per token and per row are different losses."""
    batch = packed([3, 0, 1, 0], masked=0.0)
    zeros = torch.zeros(4, dtype=torch.bool, device=batch.hidden.device)
    vectors = {"is_off_policy": zeros, "row_mask": ~zeros, "advantages_level": "row"}
    loss, *_ = run(batch, advantages=batch.advantages, **{name: vectors[name] for name in known_by})
    expected, *_ = run(batch, advantages=batch.advantages[batch.row_ids], advantages_level="token")
    per_token, *_ = run(batch, advantages=batch.advantages)
    torch.testing.assert_close(loss, expected)
    assert not torch.allclose(loss, per_token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows must be positive, got 0"),
        ({"num_rows": torch.tensor(-1.0)}, "num_rows must be positive, got -1"),
        ({"temperature": torch.ones(3)}, "'temperature': 3"),
        ({"temperature": torch.ones(2, 2)}, "temperature must be a number"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"chunk_size": -1}, "chunk_size must be at least 1; got -1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"row_ids": torch.zeros(5, dtype=torch.int32)}, "row_ids must be torch.int64; got torch.int32"),
        ({"row_ids": torch.full((5,), -1)}, "numbered from 0; got -1"),
        ({"row_ids": torch.zeros(4, dtype=torch.int64)}, r"row_ids must be \(5,\)"),
        ({"token_ids": torch.zeros(5, dtype=torch.int32)}, "token_ids must be torch.int64"),
        ({"weight": torch.zeros(37, 8, dtype=torch.uint8)}, "weight must have a floating dtype; got torch.uint8"),
        ({"advantages_level": "batch"}, "advantages_level 'batch'"),
        ({"advantages": torch.ones(2, 2)}, "advantages must be a number"),
        ({"is_off_policy": torch.zeros(2, 1, dtype=torch.bool)}, "is_off_policy must be"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_value_and_choice(packed, options, message):
    batch = packed([3, 2])
    tensors = {name: getattr(batch, name).cpu() for name in ("hidden", "weight", "token_ids", "row_ids", "advantages")}
    with pytest.raises(ValueError, match=message):
        fused_linear_grpo_loss(**{**tensors, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": torch.ones(3)}, "temperature must be a number or expand to"),
        ({"temperature": torch.zeros(5)}, "temperature must be positive"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"weight": torch.zeros(37, 8, dtype=torch.uint8)}, "weight must have a floating dtype"),
    ],
)
def test_a_log_prob_call_refuses_the_same(packed, options, message):
    batch = packed([3, 2])
    tensors = {name: getattr(batch, name).cpu() for name in ("hidden", "weight", "token_ids")}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**tensors, **options})


def test_unmasked_ids_outside_the_vocabulary_are_refused_for_held_logits():
    """A negative one was taken for padding and gave a log-prob of 0."""
    logits, ids = torch.randn(1, 3, 7), torch.tensor([[2, -100]])
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 7\); got -100"):
        fused_selective_log_softmax(logits, ids, impl="torch")
    mask = torch.tensor([[1, 0]])
    assert fused_selective_log_softmax(logits, ids, mask=mask, impl="torch")[0, 1] == 0

"""The row kernels themselves: gradients written anywhere, and the twins' agreement."""

from __future__ import annotations

import pytest
import torch
from tempsamp_kernels import reference, rows
from tempsamp_kernels.objectives import KL_ESTIMATORS, OBJECTIVES, SELF, on_tensors, token_loss
from tempsamp_kernels.tokens import HeadOptions, Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE = 2 * 4096 + 37


def chunk(num_rows=3):
    """Raw logits over three blocks of columns, and tokens: the first on-policy, the second a reference to itself."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    old, ref = -9 + normal(num_rows), -9 + normal(num_rows)
    old[0], ref[1] = SELF, SELF
    tokens = Tokens(
        torch.tensor([0, 4096, VOCAB_SIZE - 1]),
        torch.tensor([1.0, 0.7, 2.0]),
        normal(num_rows),
        torch.rand(num_rows, generator=generator),
        torch.rand(num_rows, generator=generator),
        old,
        ref,
    )
    return (2 * normal(num_rows, VOCAB_SIZE)).to(DEVICE), tokens.map(lambda field: field.to(DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_gradient_is_right_over_its_own_logits_and_elsewhere_in_either_width(dtype):
    logits, tokens = chunk()
    loss, head = token_loss("dapo"), HeadOptions(softcap=6.0)
    expected, in_place = torch.empty_like(logits), logits.clone()
    expected_terms = reference.row_loss(logits.clone(), tokens, head, loss, expected)
    for out in (torch.empty_like(logits, dtype=dtype), *([in_place] if dtype == torch.float32 else [])):
        terms = rows.row_loss(in_place if out is in_place else logits, tokens, head, loss, out)
        torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_log_prob_and_entropy_is_right_over_its_own_logits_and_elsewhere(dtype):
    logits, tokens = chunk()
    head, expected = HeadOptions(logit_scale=0.5), torch.empty_like(logits)
    statistics = reference.row_statistics(logits.clone(), tokens, head)
    d_logp, d_entropy = tokens.advantage, tokens.policy_weight
    reference.row_gradient(logits.clone(), tokens, head, statistics, d_logp, d_entropy, expected)
    out = logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)
    rows.row_gradient(logits, tokens, head, statistics, d_logp, d_entropy, out)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)


def test_a_token_outside_the_vocabulary_is_nan_and_harms_no_other():
    logits, tokens = chunk()
    expected = rows.row_statistics(logits, tokens, HeadOptions())
    tokens.token_ids[0], tokens.token_ids[2] = VOCAB_SIZE, -1
    found = rows.row_statistics(logits, tokens, HeadOptions())
    assert found.logp[[0, 2]].isnan().all() and found.logp[1] == expected.logp[1]


def derivatives(value, *inputs):
    return torch.autograd.grad(value.sum(), inputs, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objectives_derivatives_are_those_of_its_loss(name):
    """With `log_ratio` and `logp` as separate arguments, by autograd on the torch twin; detached weights stay so."""
    loss_type = {"clipped": "grpo", "likelihood": "sft"}.get(name, name)
    options = {"delta": 1.3, "dual_clip": 1.2} if name == "clipped" else {}
    loss = token_loss(loss_type, epsilon_high=1.1 if name == "cispo" else 0.2, **options)
    logp = torch.linspace(-3, -0.1, 40, dtype=torch.float64).requires_grad_()
    log_ratio = torch.linspace(-0.6, 0.6, 40, dtype=torch.float64).requires_grad_()
    for advantage in (0.7, -0.7, 0.0):
        numbers = (loss.ratio_low, loss.ratio_high, loss.option_1, loss.option_2)
        value, d_logp, d_log_ratio = on_tensors(OBJECTIVES[loss.objective])(
            logp, log_ratio, torch.full_like(logp, advantage).detach(), *numbers
        )
        by_logp, by_ratio = torch.autograd.grad(
            value.sum(), (logp, log_ratio), allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(d_logp, by_logp)
        if name != "cispo":
            torch.testing.assert_close(d_log_ratio, by_ratio)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_a_kl_estimators_derivatives_are_those_of_its_value(name):
    logp = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    log_ratio = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64).requires_grad_()
    value, d_logp, d_log_ratio = on_tensors(KL_ESTIMATORS[name])(-logp, log_ratio)
    by_logp, by_ratio = derivatives(value, logp, log_ratio)
    torch.testing.assert_close(d_logp, by_logp)
    torch.testing.assert_close(d_log_ratio, by_ratio)

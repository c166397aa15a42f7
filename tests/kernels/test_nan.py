"""What is no number stays visible, though a GPU's minimum and maximum drop NaN."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, fused_selective_log_softmax, grouped_advantages, linear_logprob
from tempsamp_kernels.advantages import SHAPINGS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 2]


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    return request.param


def loss_of(batch, impl, **options):
    loss, metrics = fused_linear_grpo_loss(
        *batch.inputs(), **batch.policies(), advantages=batch.advantages, impl=impl, **options
    )
    loss.backward()
    return loss.detach(), metrics


def test_a_row_of_nan_in_the_head_reaches_every_log_prob_and_the_loss(packed, impl):
    batch = packed(LENGTHS, masked=0.0)
    batch.weight[5] = torch.nan
    logp, entropy = linear_logprob(*batch.inputs()[:3], impl=impl)
    assert logp.isnan().all() and entropy.isnan().all()
    loss, _ = loss_of(batch.learned(), impl)
    assert loss.isnan()


@pytest.mark.parametrize("held", [0.0, torch.nan, -1.0])
def test_a_masked_token_may_hold_any_temperature(packed, impl, held):
    """With gradients of which it has none; a counted one may not."""
    batch = packed([3, 3], masked=0.0)
    batch.mask[4:] = False
    temperature = torch.full((6,), 0.7, device=DEVICE)
    plain, spoiled = batch.learned(), batch.learned()
    loss, _ = loss_of(plain, impl, temperature=temperature, live_rows=torch.ones(6, dtype=torch.bool))
    temperature[4:] = held
    same, _ = loss_of(spoiled, impl, temperature=temperature, live_rows=torch.ones(6, dtype=torch.bool))
    assert torch.equal(loss, same) and torch.equal(plain.weight.grad, spoiled.weight.grad)
    assert torch.equal(plain.hidden.grad, spoiled.hidden.grad)
    if DEVICE == "cpu":
        temperature[1] = held
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss_of(spoiled, impl, temperature=temperature)


CLAMPS = {"kl_clamp": 1.0, "log_ratio_clamp": 2.0}


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [("grpo", {"delta": 2.0, "dual_clip": 3.0}), *product(("grpo", "cispo", "sapo"), ({}, CLAMPS))],
)
def test_a_hidden_row_of_nan_makes_loss_and_its_gradient_nan_and_no_other(packed, impl, loss_type, options):
    batch = packed(LENGTHS, masked=0.0)
    batch.hidden[1] = torch.nan
    learned = batch.learned()
    loss, metrics = loss_of(learned, impl, loss_type=loss_type, **options)
    assert loss.isnan() and metrics.token_logps[1].isnan()
    finite = learned.hidden.grad.isfinite().all(1)
    assert finite.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("name", ["old_logps", "ref_logps"])
@pytest.mark.parametrize("loss_type", ["grpo", "vespo"])
def test_an_unknown_log_prob_of_a_counted_token_shows_in_the_loss(packed, impl, loss_type, name):
    batch = packed(LENGTHS, masked=0.0)
    unknown = getattr(batch, name).clone()
    unknown[0] = torch.nan
    learned = replace(batch, **{name: unknown}).learned()
    loss, _ = loss_of(learned, impl, loss_type=loss_type, kl_clamp=10.0, off_policy_ratio="old")
    assert loss.isnan() and learned.hidden.grad[0].isnan().any()


def test_nan_logits_of_a_counted_row_reach_its_log_prob_and_gradient_alone(impl):
    logits, ids = torch.randn(1, 4, 20, device=DEVICE), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    logits[0, 1, 7] = torch.nan
    logits.requires_grad_()
    logps = fused_selective_log_softmax(logits, ids, impl=impl)
    logps.sum().backward()
    assert logps.isnan().tolist() == [[False, True, False]]
    assert logits.grad.isnan().any(-1).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_a_reward_of_nan_leaves_its_group_without_numbers_and_others_alone(impl, shaping):
    """Never a silent 0: whoever computes a wrong reward finds out."""
    rewards = torch.tensor([0.2, torch.nan, 0.2, 0.7, 0.9, 0.1], device=DEVICE)
    groups = torch.tensor([0, 0, 0, 1, 1, 1], device=DEVICE)
    off_policy = torch.tensor([False, False, False, False, False, True], device=DEVICE)
    found = grouped_advantages(rewards, groups, off_policy, shaping=shaping, impl=impl)
    assert found[:3].isnan().all() and found[3:].isfinite().all()


def test_an_id_outside_the_vocabulary_is_nan_where_no_host_can_see_it(impl, monkeypatch):
    from tempsamp_kernels import logits, logprob

    if impl == "torch":
        pytest.skip("PyTorch raises")
    for module in (logits, logprob):
        monkeypatch.setattr(module, "check_token_ids", lambda *_: None)
    ids = torch.tensor([3, 11, -1, 2**32 + 3], device=DEVICE)
    logp, _ = linear_logprob(torch.randn(4, 4, device=DEVICE), torch.randn(11, 4, device=DEVICE), ids, impl=impl)
    held = fused_selective_log_softmax(torch.randn(1, 5, 11, device=DEVICE), ids[None], impl=impl)
    assert logp.isnan().tolist() == held[0].isnan().tolist() == [False, True, True, True]


def test_an_infinite_kl_of_one_side_stays_out_of_the_other_sides_metrics(packed, impl):
    batch = packed([3, 2, 2], masked=0.0)
    batch.ref_logps[0] = 500
    found = loss_of(batch.learned(), impl)[1].as_dict()
    assert found["kl"] == found["on_policy/kl"] == torch.inf
    assert 0 < found["off_policy/kl"] < 10


def test_a_gate_that_a_vast_ratio_closes_has_no_gradient(packed, impl):
    """Its slope is 0, its ratio infinite in fp32."""
    batch = packed([3, 2], masked=0.0)
    batch.old_logps[0] = -200
    loss, _ = loss_of(learned := batch.learned(), impl, loss_type="sapo", beta=0.0)
    assert loss.isfinite() and learned.hidden.grad[0].eq(0).all() and learned.hidden.grad[1].ne(0).any()


def gradients_of(batch, impl, **options):
    loss, _ = loss_of(learned := batch.learned(), impl, **options)
    return [loss, *learned.gradients()]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("held", [torch.nan, 500.0])
def test_a_kl_that_off_policy_rows_do_not_pay_may_be_no_number(packed, impl, held):
    batch = packed(LENGTHS, masked=0.0)
    batch.is_off_policy[1] = True
    off_policy = batch.is_off_policy[batch.row_ids]
    spoiled = replace(batch, ref_logps=batch.ref_logps.masked_fill(off_policy, held))
    expected, found = (gradients_of(each, impl, off_policy_kl=False) for each in (batch, spoiled))
    assert found[0].isfinite() and same(found, expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_kl_without_weight_may_overflow(packed, impl, level):
    """Where it is multiplied by the ratio, which the objective has clipped."""
    batch = packed(LENGTHS, masked=0.0)
    batch.old_logps[:] = -300
    batch.advantages[:] = 1.0
    options = {"beta": 0.0, "importance_sampling_level": level, "off_policy_ratio": "old"}
    expected, found = (gradients_of(batch, impl, kl_type=kl_type, **options) for kl_type in ("k3", "k3_corrected"))
    assert found[0].isfinite() and same(found, expected)


def test_a_target_that_overflowed_is_seen(impl):
    logits, ids = torch.randn(1, 3, 9, device=DEVICE), torch.full((1, 2), 4, device=DEVICE)
    logits[0, 0, 4] = torch.inf
    logits.requires_grad_()
    logps = fused_selective_log_softmax(logits, ids, impl=impl)
    logps.sum().backward()
    assert logps.isnan().tolist() == [[True, False]]
    assert logits.grad.isnan().any(-1).tolist() == [[True, False, False]]


@pytest.mark.parametrize("counts", [False, True])
def test_the_entropy_of_a_banned_token_is_that_of_the_others(packed, impl, counts):
    """And no gradient is spoiled by it where the caller drops its log-prob, of minus infinity."""
    batch = packed([4], masked=0.0)
    batch.token_ids[:] = torch.tensor([3, 0, 5, 7], device=DEVICE)
    batch.bias[0] = -torch.inf
    kept = batch.token_ids != 0

    def outcome(dtype):
        learned = batch.learned(dtype)
        if dtype == torch.float64:
            log_probs = (learned.hidden @ learned.weight.T)[:, 1:] + learned.bias[1:]
            log_probs = log_probs.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            logps = log_probs.gather(-1, (batch.token_ids - 1).clamp(min=0)[:, None])[:, 0]
        else:
            ids = batch.token_ids
            logps, entropy = linear_logprob(learned.hidden, learned.weight, ids, bias=learned.bias, impl=impl)
        (logps.masked_fill(~kept, 0.0).sum() + counts * entropy.sum()).backward()
        return entropy.detach().double(), learned.hidden.grad.double(), learned.weight.grad.double()

    for actual, expected in zip(outcome(None), outcome(torch.float64), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

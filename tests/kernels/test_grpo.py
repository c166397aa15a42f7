"""The fused loss against a naive fp64 loss over full logits, and the laws that a packed loss obeys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempsamp_kernels import fused_linear_grpo_loss, grouped_advantages, linear_logprob

IMPLS = ["torch", "triton"]
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "sft"]
LENGTHS = [4, 1, 3, 5]


def loss_options(loss_type):
    options = {"loss_type": loss_type}
    if loss_type == "dr_grpo":
        options["max_completion_length"] = 9
    if loss_type == "cispo":
        options["epsilon_high"] = 1.1
    return options


def fused(batch, *, loss_type="grpo", chunk_size=4, num_rows=None, **options):
    """Run and differentiate; advantages are left out for "sft", whose rows all count the same."""
    advantages = None if loss_type == "sft" else batch.advantages
    given = {**batch.policies(), "advantages": advantages, "num_rows": num_rows or len(batch.advantages)}
    loss, metrics = fused_linear_grpo_loss(
        *batch.inputs(), **{**given, "loss_type": loss_type, "chunk_size": chunk_size, **options}
    )
    loss.backward()
    return loss.detach(), metrics


def assert_equals_naive(batch, naive, impl, tolerance=2e-5, chunk_size=4, **options):
    ours, truth = batch.learned(), batch.learned(torch.float64)
    loss, metrics = fused(ours, impl=impl, chunk_size=chunk_size, **options)
    options = {{"importance_sampling_level": "level"}.get(name, name): value for name, value in options.items()}
    expected, details = naive(truth, **options)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach().float(), rtol=tolerance, atol=tolerance)
    for actual, gradient in zip(ours.gradients(), truth.gradients(), strict=True):
        torch.testing.assert_close(actual, gradient.float(), rtol=tolerance, atol=tolerance)
    return metrics, details


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_equals_the_naive_loss(packed, naive, loss_type, impl):
    assert_equals_naive(packed(LENGTHS), naive, impl, **loss_options(loss_type))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3_corrected"])
def test_every_kl_estimator_equals_the_naive_loss(packed, naive, kl_type, impl):
    """Also of a completion without an advantage, which pays the KL term alone."""
    batch = packed(LENGTHS, seed=1)
    batch.advantages[1] = 0
    assert_equals_naive(batch, naive, impl, kl_type=kl_type, beta=0.3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_ratios_shared_by_a_row_equal_the_naive_loss(packed, naive, loss_type, impl):
    assert_equals_naive(
        packed(LENGTHS, seed=2), naive, impl, loss_type=loss_type, importance_sampling_level="sequence", beta=0.1
    )


def test_a_corrected_kl_under_a_shared_ratio_spreads_its_gradient_over_the_row(packed, naive):
    options = {"importance_sampling_level": "sequence", "kl_type": "k3_corrected", "beta": 0.4}
    assert_equals_naive(packed(LENGTHS, seed=3), naive, "torch", **options)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tokens_without_an_advantage_of_their_own_learn_what_their_row_shares(packed, level):
    batch = packed(LENGTHS, seed=4)
    advantages = torch.randn(sum(LENGTHS)).to(batch.hidden.device)
    advantages[::2] = 0
    options = {"advantages": advantages, "beta": 0.0, "off_policy_ratio": "old", "importance_sampling_level": level}
    found, expected = batch.learned(), batch.learned()
    fused(found, **options)
    fused(expected, **options, live_rows=torch.ones(sum(LENGTHS), dtype=torch.bool))
    for actual, gradient in zip(found.gradients(), expected.gradients(), strict=True):
        torch.testing.assert_close(actual, gradient)


def test_rewards_belong_to_completions_where_there_are_as_many_as_tokens(packed):
    batch = packed([2, 2, 1, 1])
    rewards, no_tokens = torch.tensor([0.1, 0.7, 0.4, 0.9, 0.0, 1.0]), torch.zeros(6, dtype=torch.bool)
    grouped = {"group_ids": torch.zeros(6, dtype=torch.int64), "is_off_policy": no_tokens}
    advantages = grouped_advantages(rewards, **grouped, shaping="mixed")
    found, expected = batch.learned(), batch.learned()
    fused(found, advantages=None, rewards=rewards, **grouped, shaping="mixed")
    by_token = advantages[batch.row_ids.cpu()]
    fused(expected, advantages=by_token, advantages_level="token", is_off_policy=no_tokens)
    torch.testing.assert_close(found.hidden.grad, expected.hidden.grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scaled_loss_rounds_the_gradient_of_half_precision_hidden_states_once(packed, impl):
    """As under a GradScaler: what float16 cannot hold is scaled before it is rounded."""
    batch, scale = packed([8] * 8, masked=0.0), 2.0**16
    narrow = replace(batch, hidden=batch.hidden.half(), weight=batch.weight.half().float())
    wide = replace(narrow, hidden=narrow.hidden.float())
    found, expected = narrow.learned(), wide.learned()
    for each in (found, expected):
        loss, _ = fused_linear_grpo_loss(
            *each.inputs(), **each.policies(), advantages=1e-6 * each.advantages, beta=0.0, impl=impl
        )
        (scale * loss).backward()
    torch.testing.assert_close(found.hidden.grad, expected.hidden.grad.half(), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("bound", "positives", "negatives"),
    [({"delta": 1.5}, {0, 1, 3}, {0, 1, 2}), ({"dual_clip": 1.4}, {0, 1}, {0, 1, 4})],
    ids=["delta", "dual_clip"],
)
def test_every_branch_of_the_bounds_is_taken_and_right(packed, naive, bound, positives, negatives, impl):
    """Branches: 1 the clipped surrogate, 2 the ratio capped by `delta`, 4 the loss bounded by `dual_clip`."""
    batch = packed([12, 12], spread=0.5, masked=0.0, peak=20.0)
    batch = replace(batch, advantages=batch.advantages.new_tensor([1.0, -1.0]))
    options = {**bound, "off_policy_ratio": "old", "epsilon_high": 0.1}
    metrics, details = assert_equals_naive(batch, naive, impl, chunk_size=12, **options)
    assert set(details["branch"][:12].tolist()) == positives
    assert set(details["branch"][12:].tolist()) == negatives
    ratio = details["ratio"]
    assert float(metrics["clip_high"]) == pytest.approx(float((ratio[:12] > 1.1).sum() / 24))
    assert float(metrics["clip_low"]) == pytest.approx(float((ratio[12:] < 0.8).sum() / 24))


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_scale_and_a_temperature_per_row_equal_the_naive_loss(packed, naive, impl):
    batch = packed(LENGTHS, seed=5)
    temperature = torch.tensor([0.7, 1.0, 1.3, 2.0], device=batch.hidden.device)
    ours, truth = batch.learned(), batch.learned(torch.float64)
    loss, _ = fused(ours, temperature=temperature, softcap=3.0, logit_scale=0.7, impl=impl)
    expected, _ = naive(truth, temperature=temperature[batch.row_ids][:, None], softcap=3.0, logit_scale=0.7)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach().float(), rtol=2e-5, atol=2e-5)
    for actual, gradient in zip(ours.gradients(), truth.gradients(), strict=True):
        torch.testing.assert_close(actual, gradient.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("off_policy_ratio", ["detach", "old"])
@pytest.mark.parametrize("off_policy_kl", [True, False])
def test_off_policy_rows_have_their_own_ratio_and_kl_rule(packed, naive, off_policy_ratio, off_policy_kl):
    options = {"off_policy_ratio": off_policy_ratio, "off_policy_kl": off_policy_kl, "beta": 0.2}
    metrics, _ = assert_equals_naive(packed(LENGTHS, seed=6), naive, "torch", **options)
    assert (metrics["off_policy/ratio_max"] == 1) == (off_policy_ratio == "detach")


def test_metrics_equal_the_naive_means_of_all_on_policy_and_off_policy_tokens(packed, naive):
    batch = packed([4, 3, 5], seed=7)
    metrics, details = assert_equals_naive(batch, naive, "torch", off_policy_ratio="old")
    off_policy = batch.is_off_policy[batch.row_ids][details["index"]]
    sides = {"": torch.ones_like(off_policy), "on_policy/": ~off_policy, "off_policy/": off_policy}
    for side, chosen in sides.items():
        ratio = details["ratio"][chosen]
        expected = {
            "num_tokens": chosen.sum(),
            **{name: details[name][chosen].mean() for name in ("logp", "entropy", "kl")},
            "ratio_mean": ratio.mean(),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "effective_sample_size": ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()),
        }
        for name, value in expected.items():
            assert metrics.as_dict()[side + name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), side + name
    for tokens, name in ((metrics.token_logps, "logp"), (metrics.token_entropies, "entropy")):
        torch.testing.assert_close(tokens[details["index"]], details[name].float(), rtol=1e-5, atol=1e-5)
        assert tokens[~batch.mask].tolist() == [0.0] * int((~batch.mask).sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tokens_may_hold_nan(packed, impl):
    """Their advantages too; where they leave the backward pass, and where they stay as those that no host can see."""
    batch = packed(LENGTHS, seed=8, masked=0.4)
    advantages = batch.advantages[batch.row_ids]
    nan = {
        name: getattr(batch, name).masked_fill(~batch.mask.view(-1, *[1] * (getattr(batch, name).ndim - 1)), torch.nan)
        for name in ("hidden", "old_logps", "ref_logps")
    }
    ids = batch.token_ids.masked_fill(~batch.mask, -100)
    for live_rows in (None, torch.ones_like(batch.mask, device="cpu")):
        options = {"live_rows": live_rows, "impl": impl}
        clean, _ = fused(kept := batch.learned(), advantages=advantages, **options)
        poisoned = replace(batch, **nan, token_ids=ids).learned()
        dirty, metrics = fused(poisoned, advantages=advantages.masked_fill(~batch.mask, torch.nan), **options)
        assert torch.equal(clean, dirty) and metrics.vector.isfinite().all()
        assert all(map(torch.equal, kept.gradients(), poisoned.gradients()))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_uninitialised_memory_is_never_read(packed, level, impl):
    """In deterministic mode torch fills what `torch.empty` returns with NaN."""
    batch = packed([2, 3], seed=13)
    options = {"importance_sampling_level": level, "live_rows": (batch.row_ids == 0).cpu(), "impl": impl}
    expected, _ = fused(plain := batch.learned(), **options)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, metrics = fused(poisoned := batch.learned(), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(loss, expected) and metrics.vector.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(poisoned.gradients(), plain.gradients(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss_type", ["grpo", "sft"])
def test_nothing_to_learn_from_still_gives_a_loss_with_gradients(packed, loss_type, impl):
    batch = packed(LENGTHS)
    for nothing in (
        replace(batch, mask=torch.zeros_like(batch.mask)),
        packed([]),
    ):
        loss, metrics = fused(learned := nothing.learned(), loss_type=loss_type, impl=impl, num_rows=1)
        assert loss == 0 and all(gradient.eq(0).all() for gradient in learned.gradients())
        assert metrics.as_dict()["num_tokens"] == 0


@settings.get_profile("kernels")
@given(data=st.data())
def test_any_shape_mask_and_chunk_equals_the_naive_loss(packed, naive, data):
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    batch = packed(
        lengths,
        vocab_size=data.draw(st.integers(2, 70)),
        hidden_size=data.draw(st.integers(1, 9)),
        seed=data.draw(st.integers(0, 99)),
        masked=data.draw(st.sampled_from([0.0, 0.3, 0.9])),
    )
    options = loss_options(data.draw(st.sampled_from(LOSS_TYPES)))
    assert_equals_naive(batch, naive, "torch", 5e-5, chunk_size=data.draw(st.integers(1, 9)), **options)


def test_halves_with_the_global_row_count_add_up_to_the_whole(packed):
    batch = packed(LENGTHS, seed=9)
    loss, _ = fused(whole := batch.learned())
    parts = batch.learned()
    total = torch.zeros_like(loss)
    for rows in ([0, 1], [2, 3]):
        chosen = (batch.row_ids >= rows[0]) & (batch.row_ids <= rows[1])
        by_token = ("hidden", "token_ids", "row_ids", "old_logps", "ref_logps", "mask")
        half = replace(parts, **{name: getattr(parts, name)[chosen] for name in by_token})
        half = replace(half, advantages=batch.advantages[rows], is_off_policy=batch.is_off_policy[rows])
        total += fused(replace(half, row_ids=half.row_ids - rows[0]), num_rows=4)[0]
    torch.testing.assert_close(total, loss)
    for actual, expected in zip(parts.gradients(), whole.gradients(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_raw_rewards_and_their_advantages_give_the_same_loss(packed):
    batch = packed(LENGTHS, seed=10)
    rewards, groups = torch.tensor([0.2, 0.9, 1.0, 0.4]), torch.tensor([0, 0, 0, 1])
    options = {"rewards": rewards, "group_ids": groups, "shaping": "nonlinear", "tau": 0.7, "advantages": None}
    loss, _ = fused(one := batch.learned(), **options)
    advantages = grouped_advantages(rewards, groups, batch.is_off_policy.cpu(), tau=0.7)
    expected, _ = fused(two := replace(batch, advantages=advantages).learned())
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(one.gradients(), two.gradients(), strict=True))


def test_one_advantage_per_token_is_taken_as_such(packed):
    batch = packed(LENGTHS, seed=11)
    loss, _ = fused(batch.learned())
    spread = replace(batch, advantages=batch.advantages[batch.row_ids])
    torch.testing.assert_close(fused(spread.learned(), num_rows=4)[0], loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_known_to_be_dead_change_no_bit_of_loss_and_gradients_of_the_others(packed, impl):
    batch = packed(LENGTHS, seed=12)
    batch = replace(batch, advantages=batch.advantages * batch.advantages.new_tensor([1, 0, 1, 0]))
    everything = torch.ones_like(batch.mask, device="cpu")
    loss, _ = fused(kept := batch.learned(), beta=0.0, live_rows=everything, impl=impl)
    live = ((batch.advantages[batch.row_ids] != 0) & batch.mask).cpu()
    compact, metrics = fused(moved := batch.learned(), beta=0.0, live_rows=live, impl=impl)
    torch.testing.assert_close(compact, loss)
    torch.testing.assert_close(moved.gradients(), kept.gradients(), rtol=1e-5, atol=1e-7)
    expected, _ = linear_logprob(*batch.inputs()[:3], bias=batch.bias, impl="torch")
    torch.testing.assert_close(metrics.token_logps, expected * batch.mask, rtol=1e-5, atol=1e-5)


def test_supervised_loss_is_the_mean_over_rows_of_mean_token_nll(packed):
    batch = packed(LENGTHS, masked=0.0)
    loss, _ = fused_linear_grpo_loss(*batch.inputs(), loss_type="sft", bias=batch.bias)
    nll = torch.nn.functional.cross_entropy(
        batch.hidden @ batch.weight.T + batch.bias, batch.token_ids, reduction="none"
    )
    torch.testing.assert_close(loss, torch.stack([part.mean() for part in nll.split(LENGTHS)]).mean())


def test_a_head_tied_to_the_embedding_collects_both_gradients(packed):
    batch = packed(LENGTHS).learned()
    hidden = batch.weight[batch.token_ids].sin()
    loss, _ = fused_linear_grpo_loss(
        hidden, batch.weight, batch.token_ids, batch.row_ids, advantages=batch.advantages, chunk_size=4
    )
    loss.backward()
    hidden = batch.weight[batch.token_ids].sin()
    logps = torch.log_softmax(hidden @ batch.weight.T, -1).gather(-1, batch.token_ids[:, None])[:, 0]
    weights = batch.advantages[batch.row_ids] / torch.tensor(LENGTHS, device=hidden.device)[batch.row_ids] / 4
    (expected,) = torch.autograd.grad(-(logps * weights).sum(), batch.weight)
    torch.testing.assert_close(batch.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_hidden_states_are_read_as_they_are(packed, impl):
    batch = packed(LENGTHS)
    wide = torch.stack([batch.hidden, torch.full_like(batch.hidden, torch.nan)], dim=-1)
    loss, _ = fused(replace(batch, hidden=wide[..., 0]).learned(), impl=impl)
    inner = replace(batch, hidden=wide[..., 0], weight=batch.weight.T.contiguous().T)
    assert not inner.hidden.is_contiguous() and not inner.weight.is_contiguous()
    strided = fused_linear_grpo_loss(
        *inner.inputs(), **inner.policies(), advantages=inner.advantages, chunk_size=4, impl=impl
    )[0]
    torch.testing.assert_close(strided, loss)


def test_autocast_rounds_operands_but_neither_logits_nor_statistics(packed):
    batch = packed(LENGTHS)
    rounded = replace(batch, hidden=batch.hidden.bfloat16().float(), weight=batch.weight.bfloat16().float())
    expected, _ = fused(rounded.learned())
    with torch.autocast(batch.hidden.device.type, dtype=torch.bfloat16):
        loss, _ = fused(learned := batch.learned())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert [gradient.dtype for gradient in learned.gradients()] == [torch.float32] * 3


def test_nothing_waits_for_the_device():
    """On the meta device every attempt to look at a value raises."""
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta", requires_grad=False)
    ids = make(12, dtype=torch.int64)
    for options in ({}, {"importance_sampling_level": "sequence"}, {"loss_type": "vespo"}):
        loss, metrics = fused_linear_grpo_loss(
            make(12, 8).requires_grad_(),
            make(37, 8).requires_grad_(),
            ids,
            ids,
            rewards=make(4),
            group_ids=make(4, dtype=torch.int64),
            is_off_policy=make(4, dtype=torch.bool),
            old_logps=make(12),
            ref_logps=make(12),
            mask=make(12, dtype=torch.bool),
            impl="torch",
            **options,
        )
        loss.backward()
        assert metrics.vector.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type 'ppo'"),
        ({"kl_type": "k4"}, "kl_type 'k4'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level 'row'"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "'vespo' has no"),
        ({"off_policy_ratio": "new"}, "off_policy_ratio 'new'"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"advantages": None}, "missing"),
        ({"loss_type": "sft"}, "neither advantages nor rewards"),
        ({"impl": "cuda"}, "impl 'cuda'"),
        ({"old_logps": torch.zeros(3)}, "old_logps"),
        ({"live_rows": torch.ones(3, dtype=torch.bool)}, "live_rows"),
        ({"dual_clip": 0.0}, "dual_clip"),
        ({"loss_type": "cispo", "delta": 2.0}, "'cispo' takes no delta"),
        ({"loss_type": "sapo", "dual_clip": 2.0}, "'sapo' takes no dual_clip"),
        ({"group_ids": torch.zeros(4, dtype=torch.int64), "tau": 0.5}, "no use for group_ids, tau"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, "temperature must be positive"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be"),
        ({"is_off_policy": torch.zeros(3, dtype=torch.bool)}, "'is_off_policy': 3, 'advantages': 4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(packed, options, message):
    batch = packed(LENGTHS)
    given = {**batch.policies(), "advantages": batch.advantages, **options}
    with pytest.raises(ValueError, match=message):
        fused_linear_grpo_loss(*batch.inputs(), **given)


def test_a_sharded_or_foreign_head_is_refused_with_advice(packed):
    batch = packed(LENGTHS)
    with pytest.raises(ValueError, match="sharded"):
        fused_linear_grpo_loss(
            batch.hidden, batch.weight[:0, 0], batch.token_ids, batch.row_ids, advantages=batch.advantages
        )
    with pytest.raises(ValueError, match="row_ids must be below 4"):
        fused_linear_grpo_loss(
            *batch.inputs()[:3], batch.row_ids.cpu() + 1, advantages=batch.advantages, is_off_policy=batch.is_off_policy
        )

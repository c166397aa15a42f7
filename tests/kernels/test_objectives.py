"""Objectives and options beyond the clip, each against its paper's formula in fp64 by autograd over full logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss

IMPLS = ["torch", "triton"]
LENGTHS = [4, 1, 3, 5]
WEIGHTS = torch.linspace(0.3, 3.0, sum(LENGTHS))
FORMULAS = {
    "GSPO-token": {"importance_sampling_level": "sequence_token"},
    "CISPO, both sides": {"loss_type": "cispo", "epsilon_high": 1.1, "cispo_low": 0.9},
    "CISPO, sequence": {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    "SAPO, sequence": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "SAPO, temperatures": {"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 1.8},
    "VESPO, parameters": {
        "loss_type": "vespo",
        **{"vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5, "vespo_lambda_neg": 1.5},
    },
    "VESPO, importance": {"loss_type": "vespo", "importance_weights": WEIGHTS},
    "entropy bonus": {"entropy_coef": 0.3},
    "entropy bonus, sequence": {"entropy_coef": 0.3, "importance_sampling_level": "sequence"},
    "top entropy": {"entropy_threshold": 2.0, "entropy_coef": 0.1},
    "TIS": {"importance_weights": WEIGHTS, "importance_cap": 2.0},
    "MIS": {"importance_weights": WEIGHTS, "importance_cap": 2.0, "importance_mode": "mask"},
    "rejected rows": {"row_mask": torch.tensor([True, False, True, False])},
    "clamps": {"log_ratio_clamp": 0.3, "kl_clamp": 0.1, "kl_type": "k1"},
    "clamps, k3": {"log_ratio_clamp": 0.5, "kl_clamp": 0.05, "importance_sampling_level": "sequence"},
}


def outcomes(packed, naive, impl, options, lengths=LENGTHS):
    """(loss, gradients) of ours and of the formula."""
    batch = packed(lengths, seed=3)
    options = {"beta": 0.2, "off_policy_ratio": "old", **options}
    to_device = lambda value: value.to(batch.hidden.device) if torch.is_tensor(value) else value
    options = {name: to_device(value) for name, value in options.items()}
    ours, truth = batch.learned(), batch.learned(torch.float64)
    loss, metrics = fused_linear_grpo_loss(
        *ours.inputs(), **ours.policies(), advantages=batch.advantages, num_rows=len(lengths), chunk_size=4, impl=impl,
        **options,
    )  # fmt: skip
    loss.backward()
    options = {{"importance_sampling_level": "level"}.get(name, name): value for name, value in options.items()}
    expected, details = naive(truth, **options)
    expected.backward()
    return [loss.detach(), *ours.gradients()], [expected.detach(), *truth.gradients()], metrics, details


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradients_are_those_of_the_formula(packed, naive, name, impl):
    found, expected, *_ = outcomes(packed, naive, impl, FORMULAS[name])
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value.float(), rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_every_option_changes_something(packed, naive, name):
    """So that the formulas above are really put to the test."""
    plain = {key: value for key, value in FORMULAS[name].items() if key in ("loss_type", "epsilon_high")}
    _, with_it, *_ = outcomes(packed, naive, "torch", FORMULAS[name])
    _, without, *_ = outcomes(packed, naive, "torch", plain)
    assert not torch.allclose(with_it[1], without[1], rtol=1e-3)


def test_off_by_default_clamps_change_no_bit(packed):
    """Bounds as wide as verl's never meet such log-probs."""
    batch, found = packed(LENGTHS), []
    for options in ({}, {"log_ratio_clamp": 20.0, "kl_clamp": 10.0}):
        ours = batch.learned()
        loss, _ = fused_linear_grpo_loss(*ours.inputs(), **ours.policies(), advantages=batch.advantages, **options)
        loss.backward()
        found.append([loss.detach(), *ours.gradients()])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_a_weight_of_a_whole_row_counts_once_in_its_vespo_ratio(packed):
    """As often as it has tokens would be a power of it."""
    batch = packed(LENGTHS, masked=0.0)
    of_rows = torch.tensor([0.5, 2.0, 1.5, 0.8], device=batch.hidden.device)
    lengths = torch.tensor(LENGTHS, device=batch.hidden.device)
    of_tokens = (of_rows ** (1 / lengths))[batch.row_ids]
    options = {"loss_type": "vespo", "advantages": batch.advantages, "old_logps": batch.old_logps}
    found, expected = (
        fused_linear_grpo_loss(*batch.inputs(), importance_weights=weights, **options)[0]
        for weights in (of_rows, of_tokens)
    )
    torch.testing.assert_close(found, expected)


def test_a_row_mask_is_a_mask_over_all_tokens_of_a_row(packed):
    batch = packed(LENGTHS)
    keep = torch.tensor([True, False, True, True], device=batch.hidden.device)
    by_row, by_token = batch.learned(), replace(batch, mask=batch.mask & keep[batch.row_ids]).learned()
    for ours, options in ((by_row, {"row_mask": keep}), (by_token, {})):
        fused_linear_grpo_loss(*ours.inputs(), **ours.policies(), advantages=batch.advantages, **options)[0].backward()
    assert all(torch.equal(a, b) for a, b in zip(by_row.gradients(), by_token.gradients(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cispo_low": 0.5}, "'grpo' takes no cispo_low"),
        ({"loss_type": "cispo", "cispo_low": 0.5}, "cispo_low must be at most epsilon_high, 0.2; got 0.5"),
        ({"loss_type": "sapo", "dual_clip": 3.0}, "'sapo' takes no dual_clip"),
        ({"importance_mode": "drop"}, "importance_mode 'drop'"),
        ({"importance_weights": torch.ones(3)}, "importance_weights"),
        ({"row_mask": torch.ones(3, dtype=torch.bool)}, "row_mask"),
        ({"log_ratio_clamp": 0.0}, "log_ratio_clamp must be positive"),
        ({"kl_clamp": -1.0}, "kl_clamp must be positive"),
        ({"epsilon_low": -0.1}, "epsilon_low must not be negative"),
        ({"entropy_threshold": torch.zeros(3)}, "entropy_threshold must hold"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence_token"}, "'vespo' has no"),
    ],
)
def test_options_out_of_range_are_refused_by_name(packed, options, message):
    batch = packed(LENGTHS)
    with pytest.raises(ValueError, match=message):
        fused_linear_grpo_loss(*batch.inputs(), **{**batch.policies(), "advantages": batch.advantages, **options})

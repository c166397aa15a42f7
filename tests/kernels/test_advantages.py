"""The six advantage rules: golden values of the method, degenerate groups, order and group size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempsamp_kernels import grouped_advantages
from tempsamp_kernels.advantages import SHAPINGS, shape_rewards

IMPLS = ["torch", "triton"]
ON_POLICY = [0.6, 0.7, 0.5]


def advantages(rewards, off_policy=None, impl="torch", group_ids=None, **options):
    rewards = torch.tensor(rewards)
    off_policy = torch.zeros(len(rewards), dtype=torch.bool) if off_policy is None else torch.tensor(off_policy)
    group_ids = torch.zeros(len(rewards), dtype=torch.int64) if group_ids is None else torch.tensor(group_ids)
    return grouped_advantages(rewards, group_ids, off_policy, impl=impl, **options)


def test_shaping_matches_the_published_formula():
    shaped = shape_rewards(torch.arange(11) / 10, 0.8, 0.01, 1.0)
    golden = [0.08676, 0.21002, 0.32155, 0.42246, 0.51377, 0.59639, 0.67115, 0.73879, 0.8, 0.80095, 0.80182]
    torch.testing.assert_close(shaped, torch.tensor(golden), atol=6e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("shaping", "expected", "atol"),
    [
        ("mixed", [-0.463, 0.000, -0.925, 1.388], 6e-4),
        ("nonlinear", [-0.349, 0.415, -1.194, 1.128], 6e-4),
        ("downscale", [-0.387, 0.387, -1.161, 1.161], 6e-4),
        ("anchor", [0.0, 0.999, -0.999, 1.199], 6e-4),
        ("orarl", [-0.0071, 0.1142, -0.1071, 0.1370], 6e-5),
    ],
)
def test_rules_give_the_golden_values_of_the_worked_group(shaping, expected, atol, impl):
    found = advantages([*ON_POLICY, 1.0], [False, False, False, True], impl, shaping=shaping)
    torch.testing.assert_close(found, torch.tensor(expected), atol=atol, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("on_policy", "expected", "bonus"),
    [
        ([0.85, 0.9, 0.95], [-0.0511, -0.0011, 0.0522], 0.0200),
        (
            [index / 10 for index in range(8)],
            [-0.3565, -0.2565, -0.1565, -0.0565, 0.0467, 0.1533, 0.2598, 0.3663],
            0.4396,
        ),
        ([0.9] * 7 + [1.0], [-0.0131] * 7 + [0.0918], 0.0153),
        ([0.0] * 8, [0.0] * 8, 0.05),
        ([0.0] * 7 + [0.8], [-0.1079] * 7 + [0.7554], 0.9065),
        ([0.9] * 7 + [0.95], [-0.0073] * 7 + [0.0510], 0.0176),
        ([0.4] * 4 + [0.0] * 4, [0.2117] * 4 + [-0.2117] * 4, 0.2541),
        ([0.1] * 8, [0.0] * 8, 0.05),
        ([1.0] * 8, [0.0] * 8, 0.0),
    ],
)
def test_orarl_bounds_the_bonus_of_the_off_policy_row(on_policy, expected, bonus, impl):
    """By twice the squared surplus, by 1.2 times the best sampled advantage, and by .05 where none is above 0."""
    found = advantages([*on_policy, 1.0], [False] * len(on_policy) + [True], impl, shaping="orarl")
    torch.testing.assert_close(found, torch.tensor([*expected, bonus]), atol=6e-5, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.85, 0.9, 0.3, 1.0], [0.497, 0.499, -1.50, 0.504]),
        ([0.7, 0.7, 0.7, 1.0], [-0.5, -0.5, -0.5, 1.5]),
        ([0.9, 0.9, 0.9, 1.0], [-0.407, -0.407, -0.407, 1.220]),
        ([0.85, 0.9, 0.95, 1.0], [-1.00, -0.32, 0.34, 0.98]),
    ],
)
def test_shaping_matters_only_where_a_group_straddles_or_lies_below_tau(rewards, expected, impl):
    found = advantages(rewards, [False, False, False, True], impl, shaping="nonlinear")
    torch.testing.assert_close(found, torch.tensor(expected), atol=6e-3, rtol=0)


@pytest.mark.parametrize("shaping", ["nonlinear", "anchor", "downscale", "mixed"])
def test_the_kernel_takes_every_number_of_its_rule(shaping):
    """As its torch twin does; each of them far from the default."""
    numbers = {"tau": 0.55, "alpha_1": 0.9, "alpha_2": 3.0, "lambda_off": 2.0, "downscale": 0.3, "eps": 0.1}
    group = [*ON_POLICY, 0.9], [False, False, False, True]
    kernel, reference = (advantages(*group, impl, shaping=shaping, **numbers) for impl in ("triton", "torch"))
    torch.testing.assert_close(kernel, reference, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(reference, advantages(*group, shaping=shaping), atol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [0.3], [0.7, 0.7], [1.0] * 4])
def test_groups_without_spread_get_exactly_zero(shaping, rewards, impl):
    """Also where the standard deviation is not exactly 0, as for seven times 0.1."""
    off_policy = [False] * (len(rewards) - 1) + [len(rewards) > 1]
    if shaping == "downscale":
        off_policy = [False] * len(rewards)
    assert advantages(rewards, off_policy, impl, shaping=shaping).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shaping", ["anchor", "orarl"])
def test_a_lone_on_policy_row_beside_an_off_policy_one_gets_zero(shaping, impl):
    assert advantages([0.4, 1.0], [False, True], impl, shaping=shaping)[0] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_anchor_without_on_policy_spread_gives_the_off_policy_row_zero_too(impl):
    assert advantages([0.4, 0.4, 0.4, 1.0], [False] * 3 + [True], impl, shaping="anchor").tolist() == [0.0] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_format_rewards_are_added_after_shaping_and_downscaling(impl):
    task, form = torch.tensor([*ON_POLICY, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    off_policy, group_ids = torch.tensor([False, False, False, True]), torch.zeros(4, dtype=torch.int64)
    shaped = {"nonlinear": shape_rewards(task, 0.8, 0.01, 1.0), "downscale": torch.tensor([*ON_POLICY, 0.8])}
    for shaping, rewards in shaped.items():
        found = grouped_advantages(task, group_ids, off_policy, shaping=shaping, format_rewards=form, impl=impl)
        expected = grouped_advantages(rewards + form, group_ids, off_policy, shaping="mixed", impl=impl)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_equal_rewards_have_no_advantage_under_given_statistics_either(impl):
    rewards = torch.full((7,), 0.1)
    mean, std = rewards.mean().expand(7), torch.tensor(8e-9).expand(7)
    found = advantages(rewards.tolist(), [False] * 7, shaping="mixed", group_mean=mean, group_std=std, impl=impl)
    assert not found.any()


@pytest.mark.parametrize("shaping", ["grpo", "mixed", "nonlinear"])
def test_given_group_statistics_stand_for_rows_of_other_processes(shaping):
    rewards, off_policy = [*ON_POLICY, 1.0], [False, False, False, True]
    whole = advantages(rewards, off_policy, shaping=shaping)
    shaped = torch.tensor(rewards)
    if shaping == "nonlinear":
        shaped = shape_rewards(shaped, 0.8, 0.01, 1.0)
    mean, std = shaped.mean().expand(2), shaped.std().expand(2)
    second_half = advantages(rewards[2:], off_policy[2:], shaping=shaping, group_mean=mean, group_std=std)
    torch.testing.assert_close(second_half, whole[2:])


@pytest.mark.parametrize("shaping", SHAPINGS)
@settings(settings.get_profile("kernels"), max_examples=8)
@given(data=st.data())
def test_order_of_rows_and_other_groups_do_not_matter(shaping, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    num_rows = sum(sizes)
    tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)
    rewards = torch.tensor(data.draw(st.lists(tenths, min_size=num_rows, max_size=num_rows)))
    off_policy = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_rows, max_size=num_rows)))
    ids = data.draw(st.lists(st.integers(-9, 99), min_size=len(sizes), max_size=len(sizes), unique=True))
    group_ids = torch.repeat_interleave(torch.tensor(ids), torch.tensor(sizes))
    order = torch.tensor(data.draw(st.permutations(range(num_rows))))
    together = grouped_advantages(rewards[order], group_ids[order], off_policy[order], shaping=shaping, impl="torch")
    kernel = grouped_advantages(rewards[order], group_ids[order], off_policy[order], shaping=shaping, impl="triton")
    torch.testing.assert_close(kernel, together, atol=2e-5, rtol=2e-5)
    for group_id in ids:
        alone = [tensor[group_ids == group_id] for tensor in (rewards, group_ids, off_policy)]
        expected = grouped_advantages(*alone, shaping=shaping, impl="torch")
        found = torch.empty(num_rows).index_put_((order,), together)[group_ids == group_id]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shaping", ["anchor", *(pytest.param(name, marks=pytest.mark.slow) for name in ("downscale", "orarl"))]
)
def test_a_group_may_be_longer_than_a_block_of_the_kernel(shaping):
    """Its largest reward is in the first block of 128 rows, its smallest in the second, other groups in between."""
    rewards = torch.linspace(1, 0, 132)
    group_ids = torch.arange(132) % 2
    off_policy = torch.arange(132) % 11 == 10
    kernel, reference = (
        grouped_advantages(rewards, group_ids, off_policy, shaping=shaping, impl=impl) for impl in ("triton", "torch")
    )
    torch.testing.assert_close(kernel, reference, atol=2e-5, rtol=2e-5)


def test_arguments_that_do_not_fit_are_refused_by_name():
    rewards, ids, off_policy = torch.rand(3), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="shaping 'soft'"):
        grouped_advantages(rewards, ids, off_policy, shaping="soft")
    with pytest.raises(ValueError, match="group_ids"):
        grouped_advantages(rewards, ids[:2], off_policy)
    with pytest.raises(ValueError, match="come together"):
        grouped_advantages(rewards, ids, off_policy, group_mean=rewards)
    for shaping in ("downscale", "anchor", "orarl"):
        with pytest.raises(ValueError, match=f"'{shaping}' needs .* takes no group_mean"):
            grouped_advantages(rewards, ids, off_policy, shaping=shaping, group_mean=rewards, group_std=rewards)

"""OraRL's sign-balanced pruning: its worked groups, a brute-force twin on random groups, and what an update spends."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.config import AlgorithmConfig, TrainConfig
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.learning.pruning import kept_rows, prune_groups, prune_metrics
from tempsamp_fast.sample import Sample

ORARL = AlgorithmConfig(shaping="orarl", prune_ratio=0.5)
VIDEO = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1, dtype=torch.float64))
PROMPT = Prompt(Sample("s", Path("v.mp4"), "query", 10.0, ((2.0, 4.0),)), "answer", torch.zeros(9).long(), VIDEO)


def group_of(rewards, has_truth=True, algorithm=ORARL):
    """Scored by `algorithm`; the off-policy answer is last and earns 1."""
    rows = [Completion(torch.zeros(4).long(), "", rewards={"tiou": float(reward)}) for reward in rewards]
    rows += [Completion(torch.zeros(4).long(), "", is_off_policy=True, rewards={"tiou": 1.0})] if has_truth else []
    group = RolloutGroup(PROMPT, rows)
    assign_advantages([group], "tempsamp" if has_truth else "grpo", algorithm)
    return group


@pytest.mark.parametrize(
    ("rewards", "kept", "expected"),
    [
        ([index / 10 for index in range(8)], [0, 1, 7], [-0.2679, -0.2017, 0.2106, 0.2591]),
        ([0.0] * 7 + [0.8], [0, 1, 7], [-0.2837, -0.2837, 0.2380, 0.3293]),
        ([0.9] * 7 + [0.95], [0, 1, 7], [-0.0168, -0.0168, 0.0302, 0.0033]),
        ([0.9] * 7 + [1.0], [0, 1, 7], [-0.0283, -0.0283, 0.0567, 0.0]),
        ([0.4] * 4 + [0.0] * 4, [0, 4, 5], [0.1911, -0.2113, -0.2113, 0.2314]),
        ([0.1] * 8, [0, 1, 2], [-0.0125] * 3 + [0.0375]),
        ([1.0] * 8, [0, 1, 2], [0.0] * 4),
    ],
)
def test_the_worked_groups(rewards, kept, expected):
    group = group_of(rewards)
    (pruned,) = prune_groups([group], ORARL)
    places = {id(each): row for row, each in enumerate(group.completions)}
    assert [places[id(each)] for each in pruned.completions] == [*kept, 8]
    assert pruned.advantages.tolist() == pytest.approx(expected, abs=6e-5)
    assert len(group.completions) == 9 and pruned.prompt is group.prompt


def test_rewards_for_the_form_vary_a_group_as_those_of_the_task_do():
    """The second worked group, its .8 earned by the form."""
    algorithm = replace(ORARL, format_weight=0.8)
    group = group_of([0.0] * 8, algorithm=algorithm)
    group.completions[7].rewards["format"] = 1.0
    assign_advantages([group], "tempsamp", algorithm)
    (pruned,) = prune_groups([group], algorithm)
    assert pruned.advantages.tolist() == pytest.approx([-0.2837, -0.2837, 0.2380, 0.3293], abs=6e-5)


def by_hand(rewards, advantages, ratio, has_truth):
    """Which sampled rows stay, of all choices, and their advantages: in plain Python, from the rule's words."""
    num, given = len(rewards), int(has_truth)
    keep = max(int(num * (1 - ratio)), 2)
    if keep >= num + given:
        return None
    places = keep - given
    quota = {1: places // 2, -1: places - places // 2}

    def order(rows):
        """Sign quotas first, then signed ones by size, then zeros; lower rows first among equals."""
        sign = lambda row: (advantages[row] > 0) - (advantages[row] < 0)
        left, first, rest = dict(quota), [], []
        for row in sorted(rows, key=lambda row: (-abs(advantages[row]), row)):
            if sign(row) and left[sign(row)]:
                left[sign(row)] -= 1
                first.append(row)
            else:
                rest.append(row)
        return first + rest

    best = set(order(range(num))[:places])
    (rows,) = (each for each in itertools.combinations(range(num), places) if set(each) == best)
    values = [advantages[row] for row in rows] + ([advantages[num]] if has_truth else [])
    mean = sum(values) / keep
    values = [value - mean for value in values]
    if has_truth and values[-1] < 0:
        values = [value + values[-1] / places for value in values[:-1]] + [0.0]
    size = math.sqrt(sum(value**2 for value in values) / keep)
    before = math.sqrt(sum(value**2 for value in advantages[:num]) / num)
    if statistics.stdev(rewards) >= 1e-3 and size > 1e-6:
        values = [value * min(1, max(0.25, before / (size + 1e-6))) for value in values]
    return rows, values


@given(
    st.lists(st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=2, max_size=9),
    st.sampled_from([0.2, 0.25, 0.5, 0.75, 0.9]),
    st.booleans(),
    st.sampled_from(["orarl", "mixed", "nonlinear"]),
)
def test_pruning_is_what_its_rule_says_in_words(rewards, ratio, has_truth, shaping):
    algorithm = AlgorithmConfig(shaping=shaping, prune_ratio=ratio)
    group = group_of(rewards, has_truth, algorithm)
    (pruned,) = prune_groups([group], algorithm)
    expected = by_hand(rewards, group.advantages.tolist(), ratio, has_truth)
    if expected is None:
        assert pruned is group
        return
    rows, values = expected
    rows = [*rows, len(rewards)] if has_truth else [*rows]
    assert kept_rows(group.advantages, group.is_off_policy(), ratio) == rows
    assert pruned.completions == [group.completions[row] for row in rows]
    assert pruned.advantages.tolist() == pytest.approx(values, abs=2e-5)
    assert float(pruned.advantages.sum()) == pytest.approx(0, abs=1e-5)


def test_rows_without_a_side_are_filled_from_the_other_and_then_by_zeros():
    is_off_policy = torch.tensor([False] * 4 + [True])
    assert kept_rows(torch.tensor([0.0, 0.3, 0.2, 0.0, 1.0]), is_off_policy, 0.25) == [1, 2, 4]
    assert kept_rows(torch.tensor([0.0, -0.3, 0.0, 0.0, 1.0]), is_off_policy, 0.25) == [0, 1, 4]


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_what_is_saved_is_what_the_rows_that_are_packed_do_not_cost(tiny):
    from tempsamp_fast.model.flops import forward_flops
    from tempsamp_fast.model.packing import pack

    config = tiny.model().config
    shared = tiny.prompt((3, 6, 4))
    other = replace(shared, input_ids=torch.cat([shared.input_ids, torch.tensor([7, 8])]))
    before = [tiny.group(prompt, [5] * 8, seed=seed) for seed, prompt in enumerate((shared, other))]
    before += [tiny.group(tiny.prompt((2, 4, 4), seed=1), [3] * 8, seed=2)]
    for group in before:
        group.advantages = torch.linspace(-1, 1, 8)
    after = prune_groups(before, ORARL)
    saved = []
    for mode in ("shared_prefix", "none"):
        train = TrainConfig(packing=mode, max_tokens_per_row=10_000)
        costs = [
            sum(forward_flops(row, config) for row in pack(groups, config=config, max_tokens_per_row=10_000, mode=mode))
            for groups in (before, after)
        ]
        found = prune_metrics(before, after, train, 3, config)
        assert found == {"prune/kept_share": 0.5, "prune/flops_saved": pytest.approx(1 - costs[1] / costs[0])}
        saved.append(found["prune/flops_saved"])
    assert saved[0] < saved[1] == pytest.approx(0.5)


def test_an_update_is_of_the_rows_that_stay(stepper, monkeypatch):
    from tempsamp_fast.learning import update as update_module
    from tempsamp_fast.run.schedule import plan

    packed, pack = [], update_module.pack
    monkeypatch.setattr(update_module, "pack", lambda groups, **given: packed.extend(groups) or pack(groups, **given))
    taken = stepper("--phases", "grpo:1,sft:1", "--num_generations", "4", "--prune_ratio", "0.5")
    first, second = plan(taken.run.phases)
    groups = taken.groups(first)
    for group in groups:
        group.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    metrics = taken.run.update(first, groups)
    assert [len(group.completions) for group in packed] == [2, 2]
    assert all(group.advantages.tolist() == [1.0, -1.0] for group in packed)  # of equal rewards: not scaled
    assert metrics["prune/kept_share"] == 0.5 and 0 < metrics["prune/flops_saved"] < 0.5
    assert metrics["policy/num_tokens"] == sum(group.num_answer_tokens for group in packed)
    assert "prune/kept_share" not in taken.run.update(second, taken.groups(second))

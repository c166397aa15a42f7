"""From the rewards of groups to advantages: what of a completion counts, by which rule, with which numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning.advantage import advantages_by_rule, assign_advantages, skewness
from tempsamp_fast.sample import Sample

SAMPLE = Sample("clip/0", Path("clip.mp4"), "a square", 10.0, ((2.0, 6.0),))
VIDEO = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1))
PROMPT = Prompt(SAMPLE, "think", torch.zeros(1, dtype=torch.int64), VIDEO)
WORKED = {
    "grpo": [0.0, 0.999, -0.999],
    "mixed": [-0.463, 0.000, -0.925, 1.388],
    "downscale": [-0.387, 0.387, -1.161, 1.161],
    "anchor": [0.0, 0.999, -0.999, 1.199],
    "nonlinear": [-0.349, 0.415, -1.194, 1.128],
    "orarl": [-0.0071, 0.1142, -0.1071, 0.1370],
}
"""Of .6, .7 and .5 sampled beside a given 1.0, as the method's table has them; of `grpo` the sampled ones alone."""


def group(*sampled: float, given: float | None = None, form: tuple[float, ...] | None = None) -> RolloutGroup:
    values = [*sampled] if given is None else [*sampled, given]
    answers = [Completion(torch.zeros(1, dtype=torch.int64), "", rewards={"tiou": value}) for value in values]
    for answer, value in zip(answers, form or (), strict=form is not None):
        answer.rewards["format"] = value
    if given is not None:
        answers[-1].is_off_policy = True
    return RolloutGroup(PROMPT, answers)


def assigned(groups: list[RolloutGroup], method: str, **settings) -> list[list[float]]:
    assign_advantages(groups, method, AlgorithmConfig(**settings))
    return [each.advantages.tolist() for each in groups]


@pytest.mark.parametrize("rule", WORKED)
def test_every_rule_gives_its_golden_values_to_the_groups_of_a_step_apart(rule: str) -> None:
    """Of unequal size and in any order."""
    given = None if rule == "grpo" else 1.0
    lone, worked, tied = assigned(
        [group(0.3), group(0.6, 0.7, 0.5, given=given), group(0.2, 0.2)], "tempsamp", shaping=rule
    )
    assert worked == pytest.approx(WORKED[rule], abs=6e-4)
    assert lone == [0.0] and tied == [0.0, 0.0]


@pytest.mark.parametrize("rule", WORKED)
def test_a_grpo_phase_is_normalised_plainly_whatever_the_shaping(rule: str) -> None:
    assert assigned([group(0.1, 0.9, 0.5)], "grpo", shaping=rule) == [pytest.approx([-1, 1, 0], abs=1e-3)]


def test_supervised_answers_count_1_each() -> None:
    assert assigned([group(0.0), group(1.0, 0.5)], "sft") == [[1.0], [1.0, 1.0]]


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_format_reward_counts_once_by_its_weight(weight: float) -> None:
    sampled, form = torch.tensor([0.6, 0.7, 0.5]), torch.tensor([0.0, 1.0, 1.0])
    total = sampled + weight * form
    expected = (total - total.mean()) / (total.std() + 1e-4)
    (found,) = assigned([group(*sampled.tolist(), form=(0, 1, 1))], "grpo", format_weight=weight)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_rewards_of_several_names_add_up() -> None:
    one = group(0.1, 0.2, 0.3)
    for answer, value in zip(one.completions, (0.2, 0.1, 0.6), strict=True):
        answer.rewards["another"] = value
    assert assigned([one], "grpo") == assigned([group(0.3, 0.3, 0.9)], "grpo")


@pytest.mark.parametrize(("method", "rule"), [("grpo", "nonlinear"), ("tempsamp", "grpo"), ("tempsamp", "mixed")])
def test_without_scaling_every_group_is_centred_by_itself(method: str, rule: str) -> None:
    """Exactly 0 where all are equal, though the mean of seven times 0.1 is not 0.1 in float32."""
    groups = [group(0.1, 0.5), group(0.9, 0.3, 0.6), group(*[0.1] * 7)]
    pair, three, tied = assigned(groups, method, shaping=rule, scale_rewards=False)
    assert pair == pytest.approx([-0.2, 0.2], abs=1e-6) and three == pytest.approx([0.3, -0.3, 0], abs=1e-6)
    assert tied == [0.0] * 7


@pytest.mark.parametrize(
    ("rule", "setting", "value"),
    [
        ("nonlinear", "tau", 0.55),
        ("nonlinear", "alpha_1", 0.9),
        ("nonlinear", "alpha_2", 3.0),
        ("anchor", "lambda_off", 2.0),
        ("downscale", "downscale", 0.3),
    ],
)
def test_each_number_changes_its_own_rule_alone(rule: str, setting: str, value: float) -> None:
    """`advantages_by_rule` takes them too."""
    groups = [group(0.6, 0.9, 0.5, given=1.0)]
    before, after = (advantages_by_rule(groups, AlgorithmConfig(**settings)) for settings in ({}, {setting: value}))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [rule]
    assert assigned(groups, "tempsamp", shaping=rule, **{setting: value}) == [after[rule].tolist()]


def test_what_every_rule_makes_of_the_rewards_of_a_step() -> None:
    """Answers of all groups, one after the other; whatever the shaping of the run."""
    groups = [group(0.6, 0.7, 0.5, given=1.0), group(0.0, 0.0, given=0.0)]
    found = advantages_by_rule(groups, AlgorithmConfig(shaping="anchor"))
    assert found.keys() == WORKED.keys()
    for rule, values in found.items():
        assert values.tolist() == pytest.approx(WORKED[rule] + [0.0] * (2 if rule == "grpo" else 3), abs=6e-4), rule
    assert [each.advantages for each in groups] == [None, None]


def skewness_by_rule(groups: list[RolloutGroup], algorithm: AlgorithmConfig) -> dict[str, float]:
    return {rule: skewness(values) for rule, values in advantages_by_rule(groups, algorithm).items()}


def test_skewness_is_the_third_standardised_moment_over_all_answers_of_a_step() -> None:
    """`mixed` gives -.5, -.5, -.5, 1.5 here, and -1, 1, of which two are sampled: -.7, .7 and three zeros."""
    groups = [group(0.0, 0.0, 0.0, given=1.0)]
    found = skewness_by_rule(groups, AlgorithmConfig())
    assert found["mixed"] == pytest.approx(2 / 3**0.5)
    assert found["grpo"] == found["anchor"] == 0
    both = skewness_by_rule([*groups, group(0.0, 0.0, 1.0)], AlgorithmConfig())
    values = torch.tensor([0.0] * 3 + [-1 / 3, -1 / 3, 2 / 3], dtype=torch.float64)
    assert both["grpo"] == pytest.approx(float((values**3).mean() / (values**2).mean() ** 1.5), rel=1e-4)
    assert skewness(torch.tensor([3.0, 3.0, 4.0, 2.0])) == 0
    assert skewness(torch.tensor([1.0, 1.0, 1.0, 0.0])) == pytest.approx(-2 / 3**0.5)


def test_advantages_do_not_change_the_rewards() -> None:
    one = group(0.6, 0.7, form=(1, 0))
    before = [replace(answer, rewards=dict(answer.rewards)) for answer in one.completions]
    assigned([one], "tempsamp")
    assert [answer.rewards for answer in one.completions] == [answer.rewards for answer in before]

"""Laws of a training step: what must not change the result, and what must."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import parse_phases, prompts_per_row
from tempsamp_fast.learning import advantage
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.learning.engine import learning_rate
from tempsamp_fast.learning.groups import reward_metrics
from tempsamp_fast.learning.metrics import combine
from tempsamp_fast.run.schedule import in_steps, plan
from tests.trainer_fixtures import Stepper

THREE_STEPS = ("--phases", "sft:1,tempsamp:2", "--shaping", "anchor", "--beta", "0.04")
"""With `anchor` the advantages of a group do not add up to zero, so that the loss is no rounding error."""


FOUR_ROWS = ("--gradient_accumulation_steps", "4")


@dataclass(frozen=True)
class Trained:
    """Weights before and after all steps, and the metrics of each."""

    before: torch.Tensor
    steps: list[dict[str, float]]
    after: torch.Tensor

    @classmethod
    def of(cls, stepper: Any) -> Trained:
        return cls(stepper.weights(), stepper.steps(), stepper.weights())

    def assert_equals(self, other: Trained) -> None:
        """Losses, gradient norms and weights after all steps, the weights by how far they moved."""
        for name in ("loss", "optim/grad_norm", "policy/entropy", "policy/kl"):
            expected = [metrics[name] for metrics in other.steps if name in metrics]
            assert [m[name] for m in self.steps if name in m] == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        moved = (self.after - self.before).norm()
        assert moved > 0
        assert (self.after - other.after).norm() < 0.01 * moved


@pytest.fixture(scope="module")
def plain(trainer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, tuple[str, ...]]:
    """Four rows of a prompt each in every step of THREE_STEPS, and the words that give its answers to other runs."""
    folder = tmp_path_factory.mktemp("recorded")
    record = ("--record_rollouts", str(folder / "rollouts.jsonl"))
    trained = Trained.of(Stepper(trainer.run(folder / "run", *THREE_STEPS, *FOUR_ROWS, *record)))
    return trained, (*THREE_STEPS, "--replay_rollouts", str(folder / "rollouts.jsonl"))


@pytest.mark.parametrize(
    "words",
    [
        ("--prompts_per_device", "4", "--sft_prompts_per_device", "4", "--gradient_accumulation_steps", "1"),
        (*FOUR_ROWS, "--packing", "none"),
        (*FOUR_ROWS, "--packing", "none", "--max_tokens_per_row", "400"),
        (*FOUR_ROWS, "--zero_stage", "1"),
        (*FOUR_ROWS, "--zero_stage", "2"),
    ],
    ids=["one row of four prompts", "a row an answer", "rows of few tokens", "ZeRO 1", "ZeRO 2"],
)
def test_rows_packing_and_zero_stages_do_not_change_the_training(stepper, plain, words: tuple[str, ...]) -> None:
    """Nor the gradient norm before clipping. With the small budget, rows hold on-policy answers alone."""
    expected, replayed = plain
    Trained.of(stepper(*replayed, *words)).assert_equals(expected)


def test_the_gradient_norm_is_the_one_before_clipping(stepper) -> None:
    words = ("--phases", "sft:1", "--gradient_accumulation_steps", "1")
    (free,) = stepper(*words, "--max_grad_norm", "0").steps()
    (clipped,) = stepper(*words, "--max_grad_norm", "1e-3").steps()
    assert free["optim/grad_norm"] == clipped["optim/grad_norm"] > 1e-3


def test_clipping_bounds_the_gradient(stepper) -> None:
    """With plain SGD the weights move by learning rate times the clipped norm."""
    one = stepper("--phases", "sft:1@0.1", "--max_grad_norm", "0.5")
    one.run.engine.optimizer = torch.optim.SGD(one.run.policy.parameters(), lr=0.1)
    start = one.weights()
    one.steps()
    assert (one.weights() - start).norm().item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("words", [("--cot_off_policy=skip", "--shaping=mixed"), ("--shaping=grpo",)])
def test_without_shaping_and_off_policy_answer_tempsamp_is_grpo_exactly(stepper, words: tuple[str, ...]) -> None:
    tempsamp = stepper("--phases=tempsamp/think:2", *words)
    grpo = stepper("--phases=grpo/think:2", *words)
    ours, theirs = tempsamp.steps(), grpo.steps()
    assert ours == theirs
    assert torch.equal(tempsamp.weights(), grpo.weights())


def test_a_tempsamp_group_has_one_off_policy_answer_in_its_number(stepper) -> None:
    one = stepper("--phases", "tempsamp:1,grpo:1", "--num_generations", "4")
    tempsamp, grpo = (one.groups(at)[0] for at in plan(one.run.phases))
    assert tempsamp.is_off_policy().tolist() == [False, False, False, True]
    assert grpo.is_off_policy().tolist() == [False] * 4
    assert tempsamp.completions[-1].rewards == {"tiou": pytest.approx(1.0)}


def test_the_off_policy_answer_of_a_think_prompt_earns_the_format_reward(stepper) -> None:
    one = stepper("--phases", "tempsamp/think:1")
    (group, *_) = one.groups(next(plan(one.run.phases)))
    assert group.completions[-1].rewards == {"tiou": pytest.approx(1.0), "format": 1.0}


def test_rewards_of_a_step_that_asks_in_both_modes_are_means_over_those_that_earn_them(stepper) -> None:
    one = stepper("--phases", "tempsamp/think+answer:1", "--gradient_accumulation_steps", "3")
    groups = one.groups(next(plan(one.run.phases)))
    assert [group.prompt.mode for group in groups] == ["think", "answer", "think"]
    for group in groups:
        for index, completion in enumerate(group.completions):
            completion.rewards = {name: float(index) for name in completion.rewards}
    metrics = reward_metrics(groups)
    assert metrics["reward/tiou"] == metrics["reward/format"] == 0.5
    assert metrics["reward/on_policy_mean"] == pytest.approx(5 / 6)
    assert metrics["reward/off_policy_mean"] == pytest.approx(10 / 3)


def test_an_anchor_that_teaches_nothing_is_warned_about(stepper, caplog: pytest.LogCaptureFixture) -> None:
    one = stepper("--phases", "tempsamp:1", "--shaping", "anchor")
    groups = one.run.answer(next(plan(one.run.phases)), one.run.prompts(next(plan(one.run.phases))))
    for group in groups:
        for completion in group.completions:
            completion.rewards = {"tiou": float(completion.is_off_policy)}
    advantage._warn_of_silent_anchor.cache_clear()
    assign_advantages(groups, "tempsamp", one.run.config.algorithm)
    assert not any(group.advantages.any() for group in groups)
    assert "off-policy answer teaches nothing" in caplog.text


def test_answers_depend_on_seed_step_and_sample_alone(stepper) -> None:
    """Not on the rank, nor on what else the rank is asked."""
    run = stepper("--phases", "grpo:2", "--gradient_accumulation_steps", "3").run
    first, second = plan(run.phases)
    prompts = run.prompts(first)
    ids = lambda answers: [[completion.ids.tolist() for completion in group] for group in answers]
    together = ids(run.sample(prompts, 3, 1.0, step=first.step))
    run.rank, run.world_size = 1, 2
    alone = [ids(run.sample([prompt], 3, 1.0, step=first.step))[0] for prompt in reversed(prompts)]
    assert together == alone[::-1]
    assert len({tuple(answer) for answer in together[0]}) > 1
    assert ids(run.sample(prompts, 3, 1.0, step=second.step)) != together
    run.config.train.seed += 1
    assert ids(run.sample(prompts, 3, 1.0, step=first.step)) != together


def test_two_ranks_are_asked_what_one_is_with_twice_the_accumulation(stepper) -> None:
    words = ("--phases", "sft:2,grpo/answer+think:2", "--prompts_per_device", "1", "--sft_prompts_per_device", "2")
    asked = lambda prompts: [(prompt.sample.sample_id, prompt.mode) for prompt in prompts]
    one = stepper(*words, "--gradient_accumulation_steps", "4").run
    two = stepper(*words, "--gradient_accumulation_steps", "2").run
    two.world_size = 2
    for at in plan(one.phases):
        of_ranks = []
        for two.rank in (0, 1):
            of_ranks += asked(two.prompts(at))
        assert of_ranks == asked(one.prompts(at))
        assert len(of_ranks) == (8 if at.phase.method == "sft" else 4)


def test_a_phase_goes_on_with_the_prompt_behind_the_last_of_the_phase_before(stepper) -> None:
    """Though their steps take other numbers of prompts."""
    words = ("--phases", "sft:2,grpo:2", "--prompts_per_device", "1", "--sft_prompts_per_device", "3")
    run = stepper(*words, "--gradient_accumulation_steps", "1").run
    asked = [prompt.sample.sample_id for at in plan(run.phases) for prompt in run.prompts(at)]
    assert asked == [run.train_samples[run.order[position]].sample_id for position in range(8)]
    epochs = [run.epochs(at)["data/epoch"] for at in plan(run.phases)]
    assert epochs == pytest.approx([number / len(run.train_samples) for number in (3, 6, 7, 8)])


def test_every_epoch_asks_each_sample_once_in_another_order(stepper) -> None:
    run = stepper("--phases", "sft:1").run
    num_samples = len(run.train_samples)
    words = (f"--phases=sft:{num_samples * 2}", "--gradient_accumulation_steps=1")
    run = stepper(*words).run
    order = [prompt.sample.sample_id for at in plan(run.phases) for prompt in run.prompts(at)]
    epochs = order[:num_samples], order[num_samples:]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(sample.sample_id for sample in run.train_samples)
    assert epochs[0] != epochs[1]


def test_prompts_per_row_is_by_method() -> None:
    train = parse_args(["--prompts_per_device=2", "--sft_prompts_per_device=3"]).train
    phases = parse_phases("sft:1,grpo:1")
    assert [prompts_per_row(train, phase) for phase in phases] == [3, 2]
    train.sft_prompts_per_device = None
    assert [prompts_per_row(train, phase) for phase in phases] == [2, 2]


def test_phases_in_epochs_take_every_sample_as_often(stepper) -> None:
    """Whatever the number of devices; the last step is full."""
    train = parse_args(["--prompts_per_device=1", "--gradient_accumulation_steps=2"]).train
    phases = parse_phases("sft:7,grpo:1epoch,grpo:0.5epochs@2e-5")
    steps = {n: [phase.num_steps for phase in in_steps(phases, train, 12408, n)] for n in (1, 4, 64)}
    assert steps == {1: [7, 6204, 3102], 4: [7, 1551, 776], 64: [7, 97, 49]}
    run = stepper("--phases", "sft:2epochs").run
    assert [phase.num_steps for phase in run.phases] == [len(run.train_samples)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, *(1 - 0.9 * k / 8 for k in range(8))]),
        ("cosine", [0.5, 1, *(0.1 + 0.45 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]),
    ],
)
def test_the_learning_rate_warms_up_and_decays_within_its_phase(schedule: str, expected: list[float]) -> None:
    train = parse_args(["--learning_rate=2.0", f"--lr_schedule={schedule}", "--warmup_ratio=0.2"]).train
    for entry, peak in (("grpo:10", 2.0), ("grpo:10@5.0", 5.0)):
        (phase,) = parse_phases(entry)
        rates = [learning_rate(train, phase, step) for step in range(10)]
        assert rates == pytest.approx([peak * share for share in expected])


def test_the_step_uses_the_rate_of_its_phase(stepper) -> None:
    """Not the one that the optimizer was made with."""
    one = stepper("--phases", "sft:1,grpo:1@4e-5", "--learning_rate", "3e-5")
    rates = [metrics["optim/learning_rate"] for metrics in one.steps()]
    assert rates == [3e-5, 4e-5]
    assert {group["lr"] for group in one.run.engine.optimizer.param_groups} == {4e-5}


def test_the_first_update_has_ratio_1_and_further_ones_compare_with_the_old_policy(stepper) -> None:
    """After the first of several updates the ratio leaves 1 and is clipped; the off-policy row stays at 1."""
    once = stepper("--phases", "tempsamp:1", "--shaping", "anchor", "--beta", "0.04").steps()[0]
    assert once["policy/ratio_min"] == once["policy/ratio_max"] == 1
    words = ("--phases", "tempsamp:1", "--shaping", "anchor", "--updates_per_batch", "3", "--learning_rate", "3e-3")
    one = stepper(*words, "--epsilon_low", "0.01", "--epsilon_high", "0.01")
    at = next(plan(one.run.phases))
    groups = one.groups(at)
    groups = [replace(group, advantages=torch.tensor([1.0, -1.0, 1.0])) for group in groups]
    thrice = one.run.update(at, groups)
    assert thrice["policy/on_policy/ratio_min"] < 0.99 or thrice["policy/on_policy/ratio_max"] > 1.01
    assert thrice["policy/on_policy/clip_low"] + thrice["policy/on_policy/clip_high"] > 0
    assert thrice["policy/off_policy/ratio_mean"] == pytest.approx(1)


def test_kl_is_to_the_policy_before_its_first_reinforcement_step(stepper) -> None:
    """0 while the policy is the reference, more once it has moved; the reference never moves."""
    one = stepper("--phases", "sft:1,grpo:3", "--beta", "0.1", "--learning_rate", "1e-3")
    run = one.run
    steps = list(plan(run.phases))
    assert "policy/kl" not in run.update(steps[0], one.groups(steps[0]))
    assert run.reference is None
    before = one.weights()
    metrics = [one.run.update(at, forced(one.groups(at))) for at in steps[1:]]
    assert metrics[0]["policy/kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["policy/kl"] > 1e-6
    assert run.reference is not None
    frozen = torch.cat([parameter.flatten() for parameter in run.reference.parameters()])
    assert torch.equal(frozen, before)
    assert not run.reference.training and not any(each.requires_grad for each in run.reference.parameters())


def forced(groups: list) -> list:
    """The groups with advantages that move the policy, whatever the answers were worth."""
    return [replace(group, advantages=torch.linspace(1, -1, len(group.completions))) for group in groups]


def test_without_kl_there_is_no_reference(stepper) -> None:
    one = stepper("--phases", "grpo:1", "--beta", "0")
    at = next(plan(one.run.phases))
    assert "policy/kl" not in one.run.update(at, forced(one.groups(at)))
    assert one.run.reference is None
    assert not (one.run.folder / "reference").exists()


def test_frozen_vision_stays_as_it_was(stepper) -> None:
    one = stepper("--phases", "sft:1", "--freeze_vision")
    tower = one.run.policy.base_model.model.visual
    before, everything = [parameter.clone() for parameter in tower.parameters()], one.weights()
    one.steps()
    assert all(map(torch.equal, tower.parameters(), before))
    assert not torch.equal(one.weights(), everything)


def test_gradient_checkpointing_changes_nothing(stepper) -> None:
    words, some = ("--phases", "sft:2"), ("--checkpoint_every", "2", "--checkpoint_vision", "False")
    checkpointed = stepper(*words, "--gradient_checkpointing", *some)
    Trained.of(checkpointed).assert_equals(Trained.of(stepper(*words)))


def test_supervised_advantages_are_ones_and_the_loss_is_the_mean_negative_log_likelihood(stepper) -> None:
    one = stepper("--phases", "sft:1", "--sft_prompts_per_device", "1", "--gradient_accumulation_steps", "2")
    at = next(plan(one.run.phases))
    groups = one.run.answer(at, one.run.prompts(at))
    assign_advantages(groups, "sft", one.run.config.algorithm)
    assert [group.advantages.tolist() for group in groups] == [[1.0], [1.0]]
    metrics = one.run.update(at, groups)
    assert metrics["loss"] == pytest.approx(-metrics["policy/logp"], rel=1e-5)


def test_metrics_of_rows_are_weighed_by_their_tokens() -> None:
    whole = {"loss": 1.0, "num_tokens": 1.0, "kl": 0.5, "ratio_min": 0.9, "ratio_max": 1.5}
    rows = [
        whole | {"off_policy/num_tokens": 1.0, "off_policy/kl": 0.5},
        whole | {"num_tokens": 3.0, "kl": 0.1, "ratio_min": 0.8, "ratio_max": 1.1},
    ]
    assert combine(rows) == pytest.approx(
        {
            "loss": 2.0,
            "policy/num_tokens": 4.0,
            "policy/kl": 0.2,
            "policy/ratio_min": 0.8,
            "policy/ratio_max": 1.5,
            "policy/off_policy/num_tokens": 1.0,
            "policy/off_policy/kl": 0.5,
        }
    )


def test_every_optimizer_step_of_the_plan_comes_once(stepper: Callable) -> None:
    phases = stepper("--phases", "sft:2,grpo:1").run.phases
    assert [(at.step, at.phase.method, at.step_in_phase, at.is_last_of_phase) for at in plan(phases)] == [
        (0, "sft", 0, False),
        (1, "sft", 1, True),
        (2, "grpo", 0, True),
    ]
    assert [at.step for at in plan(phases, first_step=1)] == [1, 2]

"""Settings of advantages and loss off their defaults, against the formulas and against the kernel asked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning import loss as loss_module
from tempsamp_fast.learning import update as update_module
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.learning.groups import score
from tempsamp_fast.learning.loss import RowTargets, log_probs, policy_loss
from tempsamp_fast.run import results as results_module
from tempsamp_fast.run.results import Results
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.sample import Sample

REWARDS, FORMATS = [0.2, 0.9, 0.5, 1.0], [1.0, 0.0, 1.0, 1.0]
"""Of three sampled answers and the off-policy one."""


def group_of(rewards: list[float] = REWARDS, formats: list[float] = FORMATS) -> RolloutGroup:
    sample = Sample("s", Path("v.mp4"), "query", 10.0, ((2.0, 4.0),))
    video = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1, dtype=torch.float64))
    completions = [
        Completion(torch.tensor([1]), "2 to 4", is_off_policy=index == 3, rewards={"tiou": task, "format": form})
        for index, (task, form) in enumerate(zip(rewards, formats, strict=True))
    ]
    return RolloutGroup(Prompt(sample, "think", torch.tensor([1]), video), completions)


def normalised(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / (std + 1e-4) for value in values]


def centred(values: list[float]) -> list[float]:
    return [value - sum(values) / len(values) for value in values]


def shaped(reward: float, tau: float = 0.8, alpha_1: float = 0.01, alpha_2: float = 1.0) -> float:
    if reward >= tau:
        return tau + alpha_1 * math.log(1 + reward - tau)
    return tau - (math.exp(alpha_2 * (tau - reward)) - 1) / (math.exp(alpha_2) - 1)


def by_nonlinear(weight: float = 1.0, **settings: float) -> list[float]:
    return normalised([shaped(task, **settings) + weight * form for task, form in zip(REWARDS, FORMATS, strict=True)])


def by_anchor(lambda_off: float) -> list[float]:
    own = normalised([task + form for task, form in zip(REWARDS[:3], FORMATS[:3], strict=True)])
    return [*own, lambda_off * max(own)]


ADVANTAGES: list[tuple[dict[str, Any], list[float]]] = [
    ({"shaping": "mixed"}, normalised([task + form for task, form in zip(REWARDS, FORMATS, strict=True)])),
    ({"tau": 0.4}, by_nonlinear(tau=0.4)),
    ({"alpha_1": 0.7}, by_nonlinear(alpha_1=0.7)),
    ({"alpha_2": 3.0}, by_nonlinear(alpha_2=3.0)),
    ({"format_weight": 0.25}, by_nonlinear(0.25)),
    ({"scale_rewards": False}, centred([shaped(task) + form for task, form in zip(REWARDS, FORMATS, strict=True)])),
    (
        {"scale_rewards": False, "tau": 0.4, "alpha_1": 0.7, "alpha_2": 3.0},
        centred([shaped(task, 0.4, 0.7, 3.0) + form for task, form in zip(REWARDS, FORMATS, strict=True)]),
    ),
    ({"scale_rewards": False, "shaping": "mixed"}, centred([1.2, 0.9, 1.5, 2.0])),
    ({"shaping": "anchor", "lambda_off": 0.6}, by_anchor(0.6)),
    (
        {"shaping": "downscale", "downscale": 0.3},
        normalised([task + form for task, form in zip([*REWARDS[:3], 0.3 * 1.0], FORMATS, strict=True)]),
    ),
]


@pytest.mark.parametrize(("changed", "expected"), ADVANTAGES, ids=str)
def test_advantages_follow_the_rule_and_numbers_asked_for(changed: dict[str, Any], expected: list[float]) -> None:
    group = group_of()
    assign_advantages([group], "tempsamp", AlgorithmConfig(**changed))
    assert group.advantages is not None and group.advantages.tolist() == pytest.approx(expected, abs=1e-5)
    default = group_of()
    assign_advantages([default], "tempsamp", AlgorithmConfig())
    assert not torch.allclose(group.advantages, default.advantages, atol=1e-2)


def test_cut_answers_leave_the_loss_only_where_asked(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what token means are divided by; an answer with an end is not cut."""
    for words, is_masked in (((), False), (("--mask_truncated_completions",), True)):
        one = stepper("--phases", "grpo:1", "--loss_type", "dapo", *words)
        chat = one.run.chat
        ends = [chat.completion(torch.tensor(ids)).is_cut for ids in ([5, chat.eos_token_id], [5])]
        assert ends == [False, True] and not chat.off_policy_completion("x").is_cut
        (first,) = plan(one.run.phases)
        groups = one.groups(first)
        for group in groups:
            group.advantages = torch.tensor([1.0, -0.5, -0.5])
            for index, each in enumerate(group.completions):
                each.is_cut = index == 1
        seen: list[Any] = []

        def noting(row: Any, targets: RowTargets, *more: Any, seen: list[Any] = seen) -> Any:
            seen.append((targets.row_mask, more[-2]))
            return policy_loss(row, targets, *more)

        monkeypatch.setattr(update_module, "policy_loss", noting)
        metrics = one.run.update(first, groups)
        answers = [each for group in groups for each in group.completions]
        kept = [each for each in answers if not (is_masked and each.is_cut)]
        num_tokens = sum(len(each.ids) for each in kept)
        assert metrics["policy/num_tokens"] == num_tokens and {number for _, number in seen} == {num_tokens}
        masks = [mask.tolist() if mask is not None else None for mask, _ in seen]
        assert masks == [[True, False, True] if is_masked else None] * 2
        assert 0 <= metrics["rollout/logp_gap"] < 1e-4


def test_answers_earn_what_is_asked_for(stepper: Callable, tmp_path: Path) -> None:
    """Sampled and true ones; a fault in the file ends the run before it has a folder."""
    file = tmp_path / "mine.py"
    file.write_text("def brief(completions):\n    return [1 / (1 + len(text)) for text in completions]\n")
    one = stepper("--phases", "tempsamp:1", "--rewards", f"{file}:brief=0.5,multi_tiou=0")
    (first,) = plan(one.run.phases)
    for group in one.groups(first):
        for answer in group.completions:
            assert answer.rewards.keys() == {"brief", "multi_tiou"}
            assert answer.rewards["brief"] == 1 / (1 + len(answer.text))
    broken = tmp_path / "broken.py"
    broken.write_text("\nraise RuntimeError('no')\n")
    with pytest.raises(ValueError, match=r"broken\.py: line 2: RuntimeError: no"):
        stepper("--phases", "grpo:1", "--rewards", f"{broken}:f")
    assert not (tmp_path / "run1").exists()


def test_the_off_policy_text_of_think_prompts_is_the_one_asked_for(stepper: Callable) -> None:
    """Supervised steps keep the template."""
    run = stepper("--phases", "tempsamp/think:1,sft/think:1").run
    first, second = plan(run.phases)
    prompt = run.prompts(first)[0]
    run.sample = lambda prompts, counts, *_, **__: [[Completion(torch.tensor([1]), "")] * counts[0]]
    found = {}
    for style in ("template", "answer_only", "skip"):
        run.config.algorithm.cot_off_policy = style
        (group,) = run.answer(first, [prompt])
        found[style] = [each.text.partition(">")[0] for each in group.completions if each.is_off_policy]
        (supervised,) = run.answer(second, [prompt])
        assert supervised.completions[0].text.startswith("<think>")
    assert found == {"template": ["<think"], "answer_only": ["<answer"], "skip": []}


def test_answers_without_tags_are_worth_something_only_where_allowed(
    stepper: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    for required in (True, False):
        group = group_of()
        score(group, "grounding", AlgorithmConfig(require_tags=required))
        assert [each.rewards["tiou"] for each in group.completions] == [float(not required)] * 4
        run = stepper("--phases", "sft:1", "--require_tags", str(required)).run
        run.eval_samples = [group.prompt.sample]
        asked: list[bool] = []
        for name, answered in (
            ("evaluate", [{"text": "2 to 4", "span": None, "outside_video": False}]),
            ("score_rows", {"miou": 0.5}),
        ):
            note = lambda *of, asked=asked, answered=answered, **_: asked.append(of[-2]) or answered
            monkeypatch.setattr(results_module, name, note)
        with run.log() as log:
            Results(run).evaluate("start", 0, log)
        assert asked == [required, required]


@pytest.mark.parametrize(
    ("how", "mode", "earned"),
    [
        ("think", "answer", [{"tiou": 1.0}, {"tiou": 1.0}]),
        ("think", "think", [{"tiou": 1.0, "format": 0.0}, {"tiou": 1.0, "format": 0.0}]),
        ("add", "answer", [{"tiou": 1.0, "format": 1.0}, {"tiou": 1.0, "format": 0.0}]),
        ("factor", "answer", [{"tiou": 1.0}, {"tiou": 0.0}]),
        ("factor", "think", [{"tiou": 0.0}, {"tiou": 0.0}]),
    ],
)
def test_the_format_is_added_or_a_factor_as_asked(how: Any, mode: Any, earned: list[dict[str, float]]) -> None:
    group = group_of()
    prompt = replace(group.prompt, mode=mode)
    texts = "<answer>2 to 4</answer>", "it is <answer>2 to 4</answer>"
    group = RolloutGroup(prompt, [Completion(torch.tensor([1]), text) for text in texts])
    score(group, "grounding", AlgorithmConfig(format_reward=how))
    assert [each.rewards for each in group.completions] == earned


def test_a_wrong_form_takes_every_reward_that_is_asked_for() -> None:
    prompt = replace(group_of().prompt, mode="answer")
    group = RolloutGroup(prompt, [Completion(torch.tensor([1]), "it is <answer>2 to 4</answer>")])
    score(group, "grounding", AlgorithmConfig(format_reward="factor", rewards="tiou,location=0.5"))
    assert group.completions[0].rewards == {"tiou": 0.0, "location": 0.0}


def test_long_answers_lose_as_much_as_asked() -> None:
    """What they lose is added after the rule has shaped the task's rewards, as a format reward is."""
    group = RolloutGroup(group_of().prompt, [Completion(torch.zeros(n), "") for n in (80, 90, 100, 101)])
    score(group, "grounding", AlgorithmConfig(soft_overlong=20), max_completion_length=100)
    assert [each.rewards["overlong"] for each in group.completions] == [0, -0.5, -1, -1]
    assign_advantages([group], "grpo", AlgorithmConfig(soft_overlong=20))
    assert group.advantages is not None
    assert group.advantages.tolist() == pytest.approx(normalised([0, -0.5, -1, -1]), abs=1e-5)
    plain = RolloutGroup(group.prompt, [Completion(torch.zeros(200), "")])
    score(plain, "grounding", AlgorithmConfig(), max_completion_length=100)
    assert "overlong" not in plain.completions[0].rewards


def test_answers_of_a_run_are_long_by_its_longest(stepper: Callable) -> None:
    run = stepper("--phases", "grpo:1", "--soft_overlong", "4", "--max_completion_length", "12").run
    lengths = (6, 10, 12)
    answers = lambda: [Completion(torch.ones(length, dtype=torch.int64), "") for length in lengths]
    run.sample = lambda prompts, *_, **__: [answers() for _ in prompts]
    (first,) = plan(run.phases)
    for group in run.answer(first, run.prompts(first)):
        assert [each.rewards["overlong"] for each in group.completions] == [0, -0.5, -1]


def test_what_long_answers_lose_is_neither_shaped_nor_weighed_as_the_format_is() -> None:
    group, lost = group_of(), [0.0, -0.5, -1.0, -0.25]
    for completion, loss in zip(group.completions, lost, strict=True):
        completion.rewards["overlong"] = loss
    assign_advantages([group], "tempsamp", AlgorithmConfig(format_weight=0.25))
    values = [shaped(task) + 0.25 * form + loss for task, form, loss in zip(REWARDS, FORMATS, lost, strict=True)]
    assert group.advantages is not None
    assert group.advantages.tolist() == pytest.approx(normalised(values), abs=1e-5)


LOSSES: list[dict[str, Any]] = [
    {},
    {"beta": 0.3},
    {"epsilon_low": 0.9},
    {"epsilon_high": 0.9},
    {"delta": 1.3},
    {"dual_clip": 1.05},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo"},
    {"importance_sampling_level": "sequence"},
    {"off_policy_ratio": "old"},
    {"off_policy_kl": False},
]


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_every_number_of_the_loss_is_the_one_asked_for(tiny) -> None:
    """As the kernel gives it when asked by hand; each differs from the loss by default."""
    (row,) = update_module.pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=generator) for size in ((len(row.token_ids), 8), (64, 8)))
    logps = linear_logprob(hidden, weight, row.token_ids, temperature=0.7)[0]
    old, ref = (logps + torch.randn(len(logps), generator=generator) for _ in range(2))
    advantages = torch.tensor([1.0, -1.0]).repeat(row.num_completions // 2)
    targets = RowTargets(advantages, torch.arange(row.num_completions) % 3 == 0, old, ref)
    found = []
    for changed in LOSSES:
        options = {
            "beta": 0.04, "epsilon_low": 0.2, "epsilon_high": 0.2, "delta": None, "dual_clip": None,
            "loss_type": "grpo", "importance_sampling_level": "token", "off_policy_ratio": "detach",
            "off_policy_kl": True,
        } | changed  # fmt: skip
        expected, _ = fused_linear_grpo_loss(
            hidden, weight, row.token_ids, row.row_ids, advantages=advantages, is_off_policy=targets.is_off_policy,
            old_logps=old, ref_logps=ref, temperature=0.7, num_rows=5, num_items_in_batch=17,
            max_completion_length=9, **options,
        )  # fmt: skip
        loss, _ = policy_loss(row, targets, "tempsamp", AlgorithmConfig(**changed), 0.7, 5, 17, 9)(hidden, weight)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        found.append(round(loss.item(), 5))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_the_implementation_asked_for_computes_loss_and_log_probs(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = update_module.pack(tiny.groups()[:1], config=tiny.model().config, max_tokens_per_row=10_000)
    used: list[str | None] = []

    def stop(*_: Any, impl: str | None, **__: Any) -> Any:
        used.append(impl)
        return torch.zeros(1), None

    monkeypatch.setattr(loss_module, "fused_linear_grpo_loss", stop)
    monkeypatch.setattr(loss_module, "linear_logprob", stop)
    targets = RowTargets(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    for impl in ("torch", "triton", "auto"):
        algorithm = AlgorithmConfig(loss_impl=impl)  # type: ignore[arg-type]
        for head in (policy_loss(row, targets, "grpo", algorithm, 1.0, 1, 1, 1), log_probs(row, algorithm, 1.0)):
            head(torch.zeros(12, 4), torch.zeros(64, 4))
    assert used == ["torch"] * 2 + ["triton"] * 2 + [None] * 2


def test_a_batch_is_used_for_as_many_updates_as_asked_for(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervised steps for one; all numbers of the loss come from the run's settings."""
    calls: list[tuple[Any, ...]] = []

    def noted(*arguments: Any) -> Any:
        calls.append(arguments)
        return policy_loss(*arguments)

    monkeypatch.setattr(update_module, "policy_loss", noted)
    words = ("--gradient_accumulation_steps", "1", "--max_completion_length", "3", "--temperature", "0.7")
    one = stepper("--phases", "sft:1,grpo:1", "--updates_per_batch", "2", *words)
    sft, grpo = plan(one.run.phases)
    one.run.update(sft, one.groups(sft))
    assert one.run.engine.global_steps == 1
    groups = one.groups(grpo)
    one.run.update(grpo, [replace(group, advantages=torch.tensor([1.0, 0.0, -1.0])) for group in groups])
    assert one.run.engine.global_steps == 3
    assert calls[1][2:5] == ("grpo", one.run.config.algorithm, 0.7) and calls[1][-1] == 3
    assert calls[1][5:7] == (3, sum(group.num_answer_tokens for group in groups))


def test_saliency_is_not_rewarded_where_no_clip_has_a_score(stepper: Callable) -> None:
    with pytest.raises(ValueError, match=r"--rewards highlight: .* has no clip scores for"):
        stepper("--phases", "grpo:1", "--rewards", "highlight")

"""Groups of scored answers: who is in them, what each earns, what is recorded of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.batch import Completion, Prompt, VideoPatches
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning.groups import RecordedRollouts, RolloutGroup, answer, reward_metrics, score
from tempsamp_fast.sample import Mode, Sample, Task

VIDEO = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1))
SAMPLE = Sample("clip/0", Path("clip.mp4"), "a square", 12.0, ((2.0, 6.0), (8.0, 10.0)), {1: (4, 4, 4), 4: (1, 1, 1)})
HIGHLIGHTS = "The highlight timestamps are in the 2, 8 seconds. Their saliency scores are 5.0, 2.0."
SPANS = {"grounding": "2.00 to 6.00", "multi_grounding": "2.00 to 6.00, 8.00 to 10.00", "highlight": HIGHLIGHTS}
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "untagged": {"require_tags": False}}


class Letters:
    """A chat whose tokens are letters."""

    answer_form = "text"

    def completion(self, ids: torch.Tensor, *_: object, opening: str = "") -> Completion:
        return Completion(ids, "".join(map(chr, ids.tolist())))

    def are_answers(self, _: object) -> bool:
        return True

    def off_policy_completion(self, text: str, opening: str = "") -> Completion:
        return Completion(torch.tensor([*map(ord, text), 0]), text, is_off_policy=True)


def prompt(mode: Mode = "answer", name: str = "clip/0") -> Prompt:
    sample = Sample(name, SAMPLE.video, SAMPLE.query, SAMPLE.duration_s, SAMPLE.windows, SAMPLE.clip_scores)
    return Prompt(sample, mode, torch.zeros(1, dtype=torch.int64), VIDEO)


def answers(prompts: Sequence[Prompt], method: Any, task: Task = "grounding", **settings: Any) -> list[RolloutGroup]:
    """With 4 answers to each; the sampled ones are numbered."""
    written = lambda number: Letters().completion(torch.tensor([ord("a") + number]))
    sampler = lambda asked, counts: [[written(number) for number in range(count)] for count in counts]
    return answer(prompts, method, 4, sampler, Letters(), AlgorithmConfig(**settings), task)


@pytest.mark.parametrize(
    ("method", "settings", "num_sampled", "num_given"),
    [
        ("sft", {}, 0, 1),
        ("sft", {"shaping": "grpo"}, 0, 1),
        ("grpo", {}, 4, 0),
        ("tempsamp", {}, 3, 1),
        ("tempsamp", {"shaping": "grpo"}, 4, 0),
        ("tempsamp", {"cot_off_policy": "answer_only"}, 3, 1),
        ("tempsamp", {"cot_off_policy": "skip"}, 4, 0),
        ("sft", {"cot_off_policy": "skip"}, 0, 1),
    ],
)
def test_the_sampled_answers_come_first_and_the_given_one_makes_up_the_number(
    method: str, settings: dict[str, Any], num_sampled: int, num_given: int
) -> None:
    """In think mode; the true answer of supervised steps does not depend on what reinforcement does with it."""
    (group,) = answers([prompt("think")], method, **settings)
    assert group.is_off_policy().tolist() == [False] * num_sampled + [True] * num_given
    assert [each.text for each in group.completions[:num_sampled]] == ["a", "b", "c", "d"][:num_sampled]


@pytest.mark.parametrize("task", SPANS)
@pytest.mark.parametrize(
    ("method", "mode", "style", "thinks"),
    [
        ("tempsamp", "answer", "template", False),
        ("tempsamp", "think", "template", True),
        ("tempsamp", "think", "answer_only", False),
        ("sft", "think", "answer_only", True),
        ("sft", "think", "skip", True),
        ("sft", "answer", "template", False),
    ],
)
def test_the_given_answer_is_the_truth_of_the_task_as_the_mode_words_it(
    task: Task, method: str, mode: Mode, style: str, thinks: bool
) -> None:
    (group,) = answers([prompt(mode)], method, task, cot_off_policy=style)
    text = group.completions[-1].text
    before, _, given = text.partition("<answer>")
    assert given == f" {SPANS[task]} </answer>"
    assert before.startswith("<think>") is thinks and before.rstrip().endswith("</think>") is thinks


TEXTS = [
    "<answer> 1 to 3, 2 to 5 </answer>",
    "2 to 4",
    f"<think> so </think> <answer> {HIGHLIGHTS.replace('2.0', '4.0')} </answer>",
]


@pytest.mark.parametrize(
    ("task", "require_tags", "name", "values"),
    [
        ("grounding", True, "tiou", [3 / 4, 0, 0]),
        ("grounding", False, "tiou", [3 / 4, 2 / 4, 0]),
        ("multi_grounding", True, "multi_tiou", [3 / 7, 0, 0]),
        ("multi_grounding", False, "multi_tiou", [3 / 7, 2 / 6, 0]),
        ("highlight", True, "highlight", [0, 0, 0.6 + 0.4 / (1 + 4 * 4 / (25 + 4))]),
    ],
)
def test_each_task_is_rewarded_by_its_own_value_and_thinking_adds_the_format(
    task: Task, require_tags: bool, name: str, values: list[float]
) -> None:
    """Spans 2 to 6 and 8 to 10; of the highlights, the second one is rated 4 instead of 2."""
    for mode, form in (("answer", {}), ("think", {"format": [0, 0, 1]})):
        group = RolloutGroup(prompt(mode), [Completion(torch.zeros(1), text) for text in TEXTS])
        score(group, task, AlgorithmConfig(require_tags=require_tags))
        for index, completion in enumerate(group.completions):
            expected = {name: values[index]} | {key: each[index] for key, each in form.items()}
            assert completion.rewards == pytest.approx(expected)


@pytest.mark.parametrize("task", SPANS)
def test_untagged_answers_are_rewarded_where_no_tags_are_asked_for(task: Task) -> None:
    for require_tags, reward in ((True, 0.0), (False, 1.0)):
        group = RolloutGroup(prompt(), [Completion(torch.zeros(1), SPANS[task])])
        score(group, task, AlgorithmConfig(require_tags=require_tags))
        assert list(group.completions[0].rewards.values()) == [pytest.approx(reward)]


def test_every_group_of_a_step_is_scored_by_its_own_mode() -> None:
    groups = answers([prompt("think"), prompt("answer"), prompt("think")], "tempsamp")
    names = [[tuple(each.rewards) for each in group.completions] for group in groups]
    assert names == [[("tiou", "format")] * 4, [("tiou",)] * 4, [("tiou", "format")] * 4]


def test_long_answers_lose_by_the_limit_of_the_run() -> None:
    """Of 1 to 4 tokens; at most 3, the last 2 of which cost."""
    written = [Letters().completion(torch.full((length,), ord("a"))) for length in (1, 2, 3, 4)]
    letters: Any = Letters()
    algorithm, sampler = AlgorithmConfig(soft_overlong=2), lambda *_: [written]
    (group,) = answer([prompt()], "grpo", 4, sampler, letters, algorithm, "grounding", 3)
    assert [each.rewards["overlong"] for each in group.completions] == [0, -0.5, -1, -1]


def test_metrics_are_means_over_sampled_answers_and_given_ones_apart() -> None:
    """A format reward is averaged over the think prompts, which alone earn it."""
    rewards = [[({"tiou": 0.2}, False), ({"tiou": 1.0}, True)]]
    rewards += [[({"tiou": 0.5, "format": 1.0}, False), ({"tiou": 0.8, "format": 0.0}, False)]]
    groups = [
        RolloutGroup(
            prompt(),
            [
                Completion(torch.zeros(2 + 3 * index), "", is_off_policy, rewards=given)
                for index, (given, is_off_policy) in enumerate(of_group)
            ],
        )
        for of_group in rewards
    ]
    expected = {"reward/tiou": 0.5, "reward/format": 0.5, "reward/on_policy_mean": 2.5 / 3}
    expected |= {"reward/off_policy_mean": 1.0, "completion/mean_length": 3.0}
    found = reward_metrics(groups)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_recorded_answers_come_back_by_step_sample_and_mode(tmp_path: Path) -> None:
    """The first ones where fewer are asked for; several ranks add to one file."""
    prompts = [prompt("answer"), prompt("think"), prompt("answer", "clip/1")]
    draw = lambda texts: [[Completion(torch.tensor([ord(letter)]), letter) for letter in text] for text in texts]
    for first, last, texts in ((0, 2, ("abc", "def")), (2, 3, ("ghi",))):
        RecordedRollouts(tmp_path / "r.jsonl", Letters()).write(0, prompts[first:last], draw(texts))
    record = RecordedRollouts(tmp_path / "r.jsonl", Letters())
    record.write(7, prompts[:1], draw(["xyz"]))
    read = lambda step, asked, counts: [[each.text for each in group] for group in record.read(step, asked, counts)]
    assert read(0, prompts[::-1], [3, 2, 1]) == [["g", "h", "i"], ["d", "e"], ["a"]]
    assert read(7, prompts[:1], [2]) == [["x", "y"]]
    for step, asked, number, have in ((7, prompts[1:2], 1, 0), (0, prompts[:1], 4, 3)):
        with pytest.raises(
            ValueError, match=f"r.jsonl.*{have} answers for step {step}, sample 'clip/0'.*need {number}"
        ):
            record.read(step, asked, [number])

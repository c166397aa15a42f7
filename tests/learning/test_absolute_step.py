"""The absolute law of a training step: from known answers to new weights, the trainer equals `paper_step`.

Every setting is off its default, in combinations that bring each value together with most others. The groups have
unequal answers, members whose advantage is exactly 0, sampled answers that all earn the same, and differing sizes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.prompts import question
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.video import Geometry, normalise_rows
from tests.learning.paper_step import AdamW, KnownAnswer, KnownGroup, Step, paper_step

TRUTH = (2.0, 6.0)
QUERY = "a red square appears"
THOUGHT = "<think> it is late </think>"
SAMPLED = [
    [
        ("<answer> 2.00 to 4.00 </answer>", 2 / 4, 0),
        (f"{THOUGHT} <answer> 3 to 6 </answer>", 3 / 4, 1),
        ("<answer> 3.0 to 6.0 seconds, as far as one can tell </answer>", 3 / 4, 0),
        (f"{THOUGHT}<answer>2 to 6</answer>", 1.0, 1),
    ],
    [
        ("<answer>1 to 5</answer>", 3 / 5, 0),
        ("<answer> from 1.00 to 5.00 </answer>", 3 / 5, 0),
        ("<answer> 1 - 5 </answer>", 3 / 5, 0),
        ("<answer> 7 to 8 </answer> <answer> 1 to 5 </answer>", 3 / 5, 0),
    ],
    [
        (f"{THOUGHT} <answer> 6 to 8 </answer>", 0.0, 1),
        ("<answer> 2.0 to 5.6 </answer>", 3.6 / 4, 0),
        ("it is from 2 to 5, I think", None, 0),
        ("<answer> 2 to 5 </answer>", 3 / 4, 0),
    ],
]
"""Text, IoU with TRUTH and format reward of the sampled answers, by prompt; None: 3 / 4 where no tags are asked for."""
GIVEN = {
    "answer": "<answer> 2.00 to 6.00 </answer>",
    "template": "<think> The video shows it at <timestep> 2.00 to 6.00 </timestep>. </think> "
    "<answer> 2.00 to 6.00 </answer>",
}

OFF_DEFAULT: dict[str, Any] = {
    "tau": 0.7, "alpha_1": 0.3, "alpha_2": 2.0, "lambda_off": 1.7, "downscale": 0.6, "format_weight": 0.4,
    "temperature": 0.7, "beta": 0.3, "epsilon_low": 0.05, "epsilon_high": 0.1, "delta": 1.2, "updates_per_batch": 2,
    "max_completion_length": 30, "learning_rate": 3e-3, "weight_decay": 0.2, "adam_beta2": 0.9, "max_grad_norm": 0.5,
    "loss_type": "grpo", "importance_sampling_level": "token", "off_policy_ratio": "detach", "off_policy_kl": True,
    "require_tags": True, "cot_off_policy": "template", "packing": "shared_prefix", "shaping": "nonlinear",
    "tiny_family": "qwen2_5_vl", "num_generations": 4, "prompts_per_device": 3, "gradient_accumulation_steps": 1,
}  # fmt: skip
EPS = 1e-3
"""Of AdamW: large, so that the first step is not the sign of each gradient, whatever its size."""
THREE_ROWS = {"prompts_per_device": 1, "gradient_accumulation_steps": 3}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nonlinear": ("tempsamp/think", {}),
    "anchor": (
        "tempsamp/answer",
        {"shaping": "anchor", "loss_type": "dapo", "off_policy_ratio": "old", "off_policy_kl": False}
        | {"packing": "none", "tiny_family": "qwen3_vl", "delta": None}
        | THREE_ROWS,
    ),
    "downscale": (
        "tempsamp/think",
        {"shaping": "downscale", "loss_type": "dr_grpo", "importance_sampling_level": "sequence"}
        | {"off_policy_kl": False, "cot_off_policy": "answer_only", "tiny_family": "qwen3_vl"}
        | THREE_ROWS,
    ),
    "mixed": (
        "tempsamp/answer",
        {"shaping": "mixed", "importance_sampling_level": "sequence", "off_policy_ratio": "old", "packing": "none"}
        | {"require_tags": False},
    ),
    "orarl": (
        "tempsamp/think+answer",
        {"shaping": "orarl", "loss_type": "dr_grpo", "tiny_family": "qwen3_vl", "updates_per_batch": 1},
    ),
    "grpo": ("grpo/think", {"loss_type": "dapo", "tiny_family": "qwen3_vl", "packing": "none"}),
    "tempsamp without off-policy answers": ("tempsamp/think", {"shaping": "grpo", "require_tags": False}),
    "without KL": (
        "grpo/answer",
        {"beta": 0.0, "loss_type": "dapo", "importance_sampling_level": "sequence"} | THREE_ROWS,
    ),
    "sft": ("sft/think", {"cot_off_policy": "answer_only", "importance_sampling_level": "sequence"}),
}


@pytest.fixture(scope="module")
def annotations(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One query for each of three clips, all with the same true span."""
    videos = list(json.loads((clips / "annotations/train.json").read_text()))[:3]
    rows = {video: {"duration": 8.0, "timestamps": [TRUTH], "sentences": [QUERY]} for video in videos}
    path = tmp_path_factory.mktemp("known") / "train.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of each family, made when it is asked for."""
    texts = [text for answers in SAMPLED for text, *_ in answers] + [*GIVEN.values(), question(QUERY, "think")]
    folder = tmp_path_factory.mktemp("families")

    def checkpoint(family: str) -> Path:
        path = folder / family
        return path if path.exists() else build_tiny_checkpoint(path, texts, family)

    return checkpoint


@dataclass(frozen=True)
class Recorded:
    """Sampled answers to replay, in the order of the prompts."""

    prompts: list[Prompt]
    answers: list[list[KnownAnswer]]
    chat: Chat

    def read(self, step: int, asked: list[Prompt], num_completions: list[int]) -> list[list[Completion]]:
        assert list(asked) == self.prompts
        sampled = [[each.ids for each in known if not each.is_off_policy] for known in self.answers]
        assert list(map(len, sampled)) == num_completions
        return [[self.chat.completion(ids) for ids in of_prompt] for of_prompt in sampled]


@dataclass(frozen=True)
class Both:
    """A run, and what `paper_step` trains beside it."""

    run: Run
    settings: dict[str, Any]
    model: Any
    optimizer: AdamW
    gradients: list[dict[str, Tensor]]
    """Of the run's updates, as they are before clipping."""

    def groups(self, at: Any) -> tuple[list[RolloutGroup], list[KnownGroup]]:
        """The trainer's groups, scored and with advantages, and the same from what is known of them."""
        prompts = self.run.prompts(at)
        chat, method = self.run.chat, at.phase.method
        num_sampled = {"sft": 0, "grpo": 4, "tempsamp": 4 if self.settings["shaping"] == "grpo" else 3}[method]
        encode = lambda text: torch.cat([chat.encode(text), torch.tensor([chat.eos_token_id])])
        answers = []
        for prompt, sampled in zip(prompts, SAMPLED, strict=True):
            untagged = 0.0 if self.settings["require_tags"] else 3 / 4
            thinks = prompt.mode == "think"
            known = [
                KnownAnswer(encode(text), untagged if reward is None else reward, form * thinks)
                for text, reward, form in sampled[:num_sampled]
            ]
            if num_sampled < 4:
                style = "template" if method == "sft" else self.settings["cot_off_policy"]
                text = GIVEN["template" if thinks and style == "template" else "answer"]
                known.append(KnownAnswer(encode(text), 1.0, float(thinks and style == "template"), True))
            answers.append(known)
        self.run.replay = Recorded(prompts, answers, chat)
        groups = self.run.answer(at, prompts)
        if method != "sft":  # a group of another size than the others
            groups[1].completions.pop(1)
            answers[1].pop(1)
        assign_advantages(groups, method, self.run.config.algorithm)
        geometry = self.run.loader.geometry
        return groups, [known_group(prompt, each, geometry) for prompt, each in zip(prompts, answers, strict=True)]


def known_group(prompt: Prompt, answers: list[KnownAnswer], geometry: Geometry) -> KnownGroup:
    video = prompt.video
    pixels = normalise_rows(video.pixel_values, geometry)
    return KnownGroup(prompt.input_ids, pixels, video.grid_thw, video.second_per_grid, answers)


@pytest.fixture
def both(stepper, annotations: Path, checkpoints, tmp_path: Path) -> Callable[..., Both]:
    """`both(phases, settings, *words)`."""

    def build(phases: str, settings: dict[str, Any], *words: str) -> Both:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps({"optimizer": {"params": {"eps": EPS}}}))
        given = {name: value for name, value in settings.items() if value is not None}
        checkpoint = checkpoints(settings["tiny_family"])
        run = stepper(
            *("--model", str(checkpoint), "--annotations", str(annotations), "--phases", phases),
            *("--deepspeed_config", str(file)),
            *(word for name, value in given.items() for word in (f"--{name}", str(value))),
            *words,
        ).run
        model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        numbers = (settings[name] for name in ("weight_decay", "adam_beta2"))
        optimizer = AdamW(dict(model.named_parameters()), *numbers, EPS, settings["max_grad_norm"])
        return Both(run, settings, model, optimizer, recorded_gradients(run))

    return build


def recorded_gradients(run: Run) -> list[dict[str, Tensor]]:
    """Filled at every update from now on."""
    found: list[dict[str, Tensor]] = []
    step = run.engine.step

    def recording() -> None:
        if run.engine.is_gradient_accumulation_boundary():
            found.append({name: each.grad.clone() for name, each in run.policy.base_model.named_parameters()})
        step()

    run.engine.step = recording
    return found


def assert_equal(both: Both, groups: list[RolloutGroup], metrics: dict[str, float], expected: Step) -> None:
    """Advantages, gradients of every parameter and update, metrics, and the weights after."""
    for group, values in zip(groups, expected.advantages, strict=True):
        assert group.advantages.tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)
    num_updates = len(expected.gradients)
    for ours, theirs in zip(both.gradients[-num_updates:], expected.gradients, strict=True):
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)
    assert {name: metrics[name] for name in expected.metrics} == pytest.approx(expected.metrics, rel=1e-3, abs=1e-5)
    for name, parameter in both.run.policy.base_model.named_parameters():
        torch.testing.assert_close(parameter, both.optimizer.parameters[name], rtol=1e-3, atol=1e-5, msg=name)


def another_policy(checkpoint: Any) -> Any:
    """A reference that differs from the policy from the first update on."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_one_of_the_paper(both: Callable[..., Both], name: str) -> None:
    phase, changed = CASES[name]
    pair = both(f"{phase}:1", OFF_DEFAULT | changed)
    (at,) = plan(pair.run.phases)
    groups, known = pair.groups(at)
    reference = another_policy(pair.model.name_or_path)
    if at.phase.method != "sft" and pair.settings["beta"] > 0:
        pair.run.reference = Policy(reference)
    expected = paper_step(pair.model, reference, known, at.phase.method, pair.settings, pair.optimizer)
    metrics = pair.run.update(at, groups)
    assert_equal(pair, groups, metrics, expected)


def test_phases_share_the_optimizer_and_the_reference_is_the_policy_before_reinforcement(both) -> None:
    """Supervised, then two kinds of reinforcement, each step in rows of one prompt."""
    pair = both("sft/answer:1,grpo/think:1,tempsamp/answer:1", OFF_DEFAULT | THREE_ROWS)
    reference = None
    for at in plan(pair.run.phases):
        groups, known = pair.groups(at)
        if at.phase.method != "sft" and reference is None:
            reference = deepcopy(pair.model)
        expected = paper_step(pair.model, reference, known, at.phase.method, pair.settings, pair.optimizer)
        assert_equal(pair, groups, pair.run.update(at, groups), expected)

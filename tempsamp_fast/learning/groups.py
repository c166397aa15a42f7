"""From prompts to groups of scored answers: sampled ones, plus the off-policy one made from the ground truth."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Method
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.rewards import REWARDS, TASK_REWARDS
from tempsamp_fast.sample import Task
from tempsamp_fast.system.files import open_to_append

Sampler = Callable[[Sequence[Prompt], Sequence[int]], list[list[Completion]]]
"""`(prompts, number of completions of each) -> completions by prompt`, all on-policy."""


def answer(
    prompts: Sequence[Prompt],
    method: Method,
    num_generations: int,
    sampler: Sampler,
    chat: Chat,
    algorithm: AlgorithmConfig,
    task: Task,
) -> list[RolloutGroup]:
    """One scored group per prompt: `sft` the true answer alone, `grpo` sampled answers alone, `tempsamp` both.

    A `tempsamp` group has `num_generations - 1` sampled answers and the off-policy one; all sampled with
    `shaping="grpo"`, and where `cot_off_policy="skip"` leaves a think prompt without off-policy text.
    """
    off_policy = [_off_policy(prompt, method, chat, algorithm, task) for prompt in prompts]
    if method == "sft":
        return [RolloutGroup(prompt, given) for prompt, given in zip(prompts, off_policy, strict=True)]
    sampled = sampler(prompts, [num_generations - len(given) for given in off_policy])
    groups = [
        RolloutGroup(prompt, [*drawn, *given])
        for prompt, drawn, given in zip(prompts, sampled, off_policy, strict=True)
    ]
    for group in groups:
        score(group, task, algorithm)
    return groups


def _off_policy(prompt: Prompt, method: Method, chat: Chat, algorithm: AlgorithmConfig, task: Task) -> list[Completion]:
    if method == "grpo" or (method == "tempsamp" and algorithm.shaping == "grpo"):
        return []
    style = "template" if method == "sft" else algorithm.cot_off_policy
    text = off_policy_text(prompt.sample, prompt.mode, style, task)
    return [] if text is None else [chat.off_policy_completion(text)]


def score(group: RolloutGroup, task: Task, algorithm: AlgorithmConfig) -> None:
    """Fill `rewards` of every completion: the task's reward, and `format` in think mode.

    To add a reward, register it in `rewards.REWARDS` and name it in `rewards.TASK_REWARDS`.
    """
    texts = [completion.text for completion in group.completions]
    names = [TASK_REWARDS[task]] + (["format"] if group.prompt.mode == "think" else [])
    for name in names:
        values = REWARDS[name](texts, samples=[group.prompt.sample] * len(texts), require_tags=algorithm.require_tags)
        for completion, value in zip(group.completions, values, strict=True):
            completion.rewards[name] = value


class RecordedRollouts:
    """Sampled answers on disk, so that two runs can be fed the same ones: a JSON line per step and sample."""

    def __init__(self, path: str | Path, chat: Chat):
        self.path = Path(path)
        self.chat = chat
        self._answers: dict[tuple[int, str, str], list[Completion]] = {}

    def write(self, step: int, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> None:
        """Append the answers of one step; several ranks may write to one file."""
        lines = []
        for prompt, completions in zip(prompts, answers, strict=True):
            ids = [completion.ids.tolist() for completion in completions]
            row = {"step": step, "sample_id": prompt.sample.sample_id, "mode": prompt.mode, "ids": ids}
            lines.append(json.dumps(row) + "\n")
        with open_to_append(self.path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.writelines(lines)

    def read(self, step: int, prompts: Sequence[Prompt], num_completions: Sequence[int]) -> list[list[Completion]]:
        """The recorded answers to `prompts`. Raises ValueError naming the file and what it lacks."""
        if not self._answers:
            with self.path.open() as file:
                for row in map(json.loads, file):
                    self._answers[row["step"], row["sample_id"], row["mode"]] = [
                        self.chat.completion(torch.tensor(ids)) for ids in row["ids"]
                    ]
        found = []
        for prompt, number in zip(prompts, num_completions, strict=True):
            key = (step, prompt.sample.sample_id, prompt.mode)
            completions = self._answers.get(key)
            if completions is None or len(completions) < number:
                have = 0 if completions is None else len(completions)
                raise ValueError(
                    f"replay_rollouts={str(self.path)!r}: {have} answers for step {step}, sample "
                    f"{prompt.sample.sample_id!r}, mode {prompt.mode}; need {number}"
                )
            found.append(completions[:number])
        return found


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Means over on-policy answers (`reward/tiou`, ..., their sum `reward/on_policy_mean`), off-policy ones apart.

    `reward/format` is the mean over think prompts, which alone earn it.
    """
    every = [completion for group in groups for completion in group.completions]
    metrics = {}
    for label, chosen in (
        ("on", [c for c in every if not c.is_off_policy]),
        ("off", [c for c in every if c.is_off_policy]),
    ):
        if chosen and chosen[0].rewards:
            totals = [sum(completion.rewards.values()) for completion in chosen]
            metrics[f"reward/{label}_policy_mean"] = sum(totals) / len(totals)
            if label == "on":
                for name in dict.fromkeys(name for each in chosen for name in each.rewards):
                    values = [each.rewards[name] for each in chosen if name in each.rewards]
                    metrics[f"reward/{name}"] = sum(values) / len(values)
    metrics["completion/mean_length"] = sum(len(completion.ids) for completion in every) / len(every)
    return metrics

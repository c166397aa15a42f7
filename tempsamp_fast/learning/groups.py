"""From prompts to groups of scored answers: sampled ones, plus the off-policy one made from the ground truth."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig, Method
from tempsamp_fast.config.reward_terms import RewardTerm, weighted
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.data.text_files import get, json_rows, shown
from tempsamp_fast.learning.own_rewards import reward_function, reward_terms
from tempsamp_fast.rewards import soft_overlong
from tempsamp_fast.sample import AnswerForm, Task
from tempsamp_fast.system.files import open_to_append

TIED = 1e-6
"""Sums of rewards that differ by less are the same."""
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
    max_completion_length: int = 0,
) -> list[RolloutGroup]:
    """One scored group per prompt: `sft` the true answer alone, `grpo` sampled answers alone, `tempsamp` both.

    A `tempsamp` group has `num_generations - 1` sampled answers and the off-policy one; all sampled with
    `shaping="grpo"`, and where `cot_off_policy="skip"` leaves a think prompt without off-policy text.
    `max_completion_length` is read with `soft_overlong`.
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
        score(group, task, algorithm, chat.answer_form, max_completion_length)
    return groups


def _off_policy(prompt: Prompt, method: Method, chat: Chat, algorithm: AlgorithmConfig, task: Task) -> list[Completion]:
    if method == "grpo" or (method == "tempsamp" and algorithm.shaping == "grpo"):
        return []
    style = "template" if method == "sft" else algorithm.cot_off_policy
    text = off_policy_text(prompt.sample, prompt.mode, style, task, chat.answer_form)
    if text is None and method == "sft":
        raise ValueError(f"sample {prompt.sample.sample_id!r}: there is no true answer to learn")
    return [] if text is None else [chat.off_policy_completion(text, prompt.opening)]


def score(
    group: RolloutGroup,
    task: Task,
    algorithm: AlgorithmConfig,
    answer_form: AnswerForm = "text",
    max_completion_length: int = 0,
) -> None:
    """Fill `rewards` of every completion: the task's or those of `--rewards`, `format` where it is added, `overlong`
    where asked for.

    With `format_reward="factor"` all but `overlong` are 0 where the format is wrong.
    """
    texts, how = [completion.text for completion in group.completions], algorithm.format_reward
    terms, is_think = reward_terms(algorithm, task), group.prompt.mode == "think"
    forms = ["format"] if is_think else ["answer_format"] if how != "think" else []
    options: dict[str, Any] = {"require_tags": algorithm.require_tags, "answer_form": answer_form}
    options |= {"samples": [group.prompt.sample] * len(texts), "mode": group.prompt.mode}
    for term in (*terms, *map(RewardTerm, forms)):
        values = reward_function(term)(texts, **options)
        for completion, value in zip(group.completions, values, strict=True):
            completion.rewards["format" if term.name in forms else term.name] = value
    for completion in group.completions:
        if how == "factor":
            factor = completion.rewards.pop("format")
            completion.rewards.update({term.name: factor * completion.rewards[term.name] for term in terms})
        if algorithm.soft_overlong is not None:
            length = len(completion.ids)
            completion.rewards["overlong"] = soft_overlong(length, max_completion_length, algorithm.soft_overlong)


class RecordedRollouts:
    """Sampled answers on disk, so that two runs can be fed the same ones: a JSON line per step and sample."""

    def __init__(self, path: str | Path, chat: Chat):
        self.path = Path(path)
        self.chat = chat
        self._answers: dict[tuple[int, str, str], list[list[int]]] = {}

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
            for place, _, row in json_rows(self.path):
                at, name, mode = (get(place, row, field) for field in ("step", "sample_id", "mode"))
                ids = get(place, row, "ids")
                if [type(at), type(name), type(mode)] != [int, str, str] or not self.chat.are_answers(ids):
                    raise ValueError(f"{place}: {shown(row)} is no row of sampled answers")
                self._answers[at, name, mode] = ids
        found = []
        for prompt, number in zip(prompts, num_completions, strict=True):
            key = (step, prompt.sample.sample_id, prompt.mode)
            answers = self._answers.get(key, [])
            if len(answers) < number:
                have = len(answers)
                raise ValueError(
                    f"replay_rollouts={str(self.path)!r}: {have} answers for step {step}, sample "
                    f"{prompt.sample.sample_id!r}, mode {prompt.mode}; need {number}"
                )
            given = (torch.tensor(ids) for ids in answers[:number])
            found.append([self.chat.completion(ids, opening=prompt.opening) for ids in given])
        return found


def reward_metrics(groups: Sequence[RolloutGroup], rewards: str | None = None) -> dict[str, float]:
    """Means over on-policy answers (`reward/tiou`, ..., their sum `reward/on_policy_mean`), off-policy ones apart.

    rewards: the setting, whose weights the sums are of.

    `reward/format` is the mean over think prompts, which alone earn it. `reward/std` is the mean over groups of the
    standard deviation of on-policy sums, `reward/tied_groups` the share of groups whose answers, the off-policy one
    included, all earned the same. `completion/*` describes sampled answers: their lengths, and `cut_share`, how many
    were cut at the limit. What has no answers is left out.
    """
    every = [completion for group in groups for completion in group.completions]
    metrics = {}
    for label, chosen in (
        ("on", [c for c in every if not c.is_off_policy]),
        ("off", [c for c in every if c.is_off_policy]),
    ):
        if chosen and chosen[0].rewards:
            totals = [weighted(completion.rewards, rewards) for completion in chosen]
            metrics[f"reward/{label}_policy_mean"] = sum(totals) / len(totals)
            if label == "on":
                for name in dict.fromkeys(name for each in chosen for name in each.rewards):
                    values = [each.rewards[name] for each in chosen if name in each.rewards]
                    metrics[f"reward/{name}"] = sum(values) / len(values)
    totals_by_group = [
        [weighted(completion.rewards, rewards) for completion in group.completions if completion.rewards]
        for group in groups
    ]
    sampled_by_group = [[each for each in group.completions if not each.is_off_policy] for group in groups]
    deviations = [
        pstdev(weighted(each.rewards, rewards) for each in sampled) for sampled in sampled_by_group if len(sampled) > 1
    ]
    if deviations:
        metrics["reward/std"] = fmean(deviations)
        metrics["reward/tied_groups"] = fmean(max(totals) - min(totals) < TIED for totals in totals_by_group)
    sampled = [each for group in sampled_by_group for each in group]
    if sampled:
        lengths = [len(each.ids) for each in sampled]
        metrics["completion/mean_length"] = fmean(lengths)
        metrics["completion/min_length"], metrics["completion/max_length"] = float(min(lengths)), float(max(lengths))
        metrics["completion/cut_share"] = fmean(each.is_cut for each in sampled)
    return metrics

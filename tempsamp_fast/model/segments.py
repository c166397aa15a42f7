"""What of a packed row is one tree: a group of answers, or all groups about one video behind what they share."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.mrope import mrope_positions

logger = logging.getLogger(__name__)

Branches = tuple[Prompt, Sequence[Tensor]]
"""A prompt and the token ids of its answers."""


@dataclass(frozen=True)
class Segment:
    """A tree's share of a row, before concatenation."""

    prompts: tuple[Prompt, ...]
    """They have one video."""
    answers: tuple[Tensor, ...]
    """Of prompt after prompt."""
    layout: GroupLayout
    input_ids: Tensor
    """[num_tokens] int64."""
    position_ids: Tensor
    """[3, num_tokens] int64."""
    last_tokens: tuple[int, ...]
    """Of each prompt: where its last token lies."""

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def videos(self) -> list[VideoPatches]:
        """The one of the tree; none where its grid has no frames, which stands for prompts without a video."""
        video = self.prompts[0].video
        return [video] if video.grid_thw[0] > 0 else []


def segment(prompt: Prompt, answers: Sequence[Tensor], config: Any) -> Segment:
    """One prompt and its answers. Raises ValueError naming the sample of an answer without tokens."""
    return _tree([(prompt, answers)], len(prompt.input_ids), config)


def segments(branches: Iterable[Branches], config: Any, max_tokens: float = math.inf) -> Iterator[Segment]:
    """Trees in order: neighbours about one video (the same object) as one, as far as they fit `max_tokens` together."""
    for _, neighbours in groupby(branches, lambda each: id(each[0].video)):
        waiting = list(neighbours)
        shared = num_shared([prompt for prompt, _ in waiting], config)
        while waiting:
            own = [len(prompt.input_ids) - shared + sum(map(len, answers)) for prompt, answers in waiting]
            number = 1
            while shared and number < len(waiting) and shared + sum(own[: number + 1]) <= max_tokens:
                number += 1
            whole = len(waiting[0][0].input_ids)
            yield _tree(waiting[:number], shared if number > 1 else whole, config)
            waiting = waiting[number:]


def num_shared(prompts: Sequence[Prompt], config: Any) -> int:
    """Tokens that all of these prompts about one video begin with, each keeping one of its own at least.

    0 for a single prompt, and where the video is not among them: a template that puts the text first.
    """
    if len(prompts) < 2:
        return 0
    shortest = min(len(prompt.input_ids) for prompt in prompts) - 1
    ids = torch.stack([prompt.input_ids[:shortest] for prompt in prompts])
    differs = (ids != ids[0]).any(dim=0).nonzero()
    shared = int(differs[0]) if len(differs) else shortest
    placeholders = (prompts[0].input_ids == config.video_token_id).nonzero()
    if not len(placeholders):
        return 0
    if int(placeholders[-1]) >= shared:
        _tell_text_first()
        return 0
    return shared


def by_tree(groups: Iterable[RolloutGroup]) -> list[list[RolloutGroup]]:
    """Neighbours about one video (the same object) together."""
    return [list(neighbours) for _, neighbours in groupby(groups, lambda group: id(group.prompt.video))]


def num_tree_tokens(groups: Sequence[RolloutGroup], config: Any) -> int:
    """Tokens of neighbouring groups about one video as one tree."""
    shared = num_shared([group.prompt for group in groups], config)
    return sum(group.num_tokens for group in groups) - (len(groups) - 1) * shared


@cache
def _tell_text_first() -> None:
    logger.warning("prompts about one video differ before it: each is run by itself, video and all")


def _tree(branches: Sequence[Branches], shared: int, config: Any) -> Segment:
    """`[shared | rest of q1 | rest of q2 | ... | answers to q1 | ...]`; of a single prompt all is shared."""
    prompts = tuple(prompt for prompt, _ in branches)
    for prompt, answers in branches:
        if any(len(ids) == 0 for ids in answers):
            raise ValueError(f"sample {prompt.sample.sample_id!r} has an answer without tokens")
    rests = [prompt.input_ids[shared:] for prompt in prompts if len(branches) > 1]
    answers = [ids for _, of_prompt in branches for ids in of_prompt]
    placed = [_positions(prompt, config) for prompt in prompts]
    positions, parents = [placed[0][0][:, :shared]], [0] * len(rests)
    positions += [of_prompt[:, shared:] for of_prompt, _ in placed if rests]
    for index, (_, of_prompt) in enumerate(branches):
        parents += [index + 1 if rests else 0] * len(of_prompt)
        start = placed[index][1]
        positions += [torch.arange(start, start + len(ids)).expand(3, -1) for ids in of_prompt]
    layout = GroupLayout(shared, tuple(map(len, [*rests, *answers])), tuple(parents) if rests else ())
    asked = layout.nodes[1 : len(rests) + 1] or layout.nodes[:1]
    return Segment(
        prompts=prompts,
        answers=tuple(answers),
        layout=layout,
        input_ids=torch.cat([prompts[0].input_ids[:shared], *rests, *answers]),
        position_ids=torch.cat(positions, dim=1),
        last_tokens=tuple(node.start + node.length - 1 for node in asked),
    )


def _positions(prompt: Prompt, config: Any) -> tuple[Tensor, int]:
    """[3, prompt_len], and where its answers start."""
    video = prompt.video
    has_video = video.grid_thw[0] > 0
    grids, seconds = ([video.grid_thw], [video.second_per_grid]) if has_video else ([], [])
    return mrope_positions(prompt.input_ids, grids, seconds, config)

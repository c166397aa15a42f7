"""Rows of whole groups: `[prompt | c1 | ... | cG]`, each prompt and its video once for all of its answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt, RolloutGroup, Sample, VideoPatches, VisionFeatures
from tempsamp_fast.model.mrope import mrope_positions

PackingMode = Literal["shared_prefix", "none"]


@dataclass(frozen=True)
class Node:
    """A span of tokens that continues its parent: it attends to the spans on its path, and to itself causally."""

    start: int
    """Of its first token, counted from the first of its group."""
    length: int
    path: tuple[int, ...]
    """Its ancestors among the nodes of the group, the root first."""
    is_leaf: bool


@dataclass(frozen=True)
class GroupLayout:
    """What of one group attends to what: a tree of token spans, laid one after the other from the root on.

    All that concerns attention, states, FLOPs and memory reads `nodes`.
    """

    prompt_len: int
    branch_lens: tuple[int, ...]
    """Length of each further node, in order; empty for a prompt that is only prefilled."""
    parents: tuple[int, ...] = ()
    """The node that each of them continues (0 is the prompt), every one before its children; empty: all the prompt."""

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + sum(self.branch_lens)

    @property
    def num_leaves(self) -> int:
        """Answers: nodes that nothing continues, the prompt not among them."""
        return sum(node.is_leaf for node in self.nodes[1:])

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The prompt, then the further nodes in order. Raises ValueError for a parent that does not come before."""
        lengths = self.prompt_len, *self.branch_lens
        parents = self.parents or (0,) * len(self.branch_lens)
        if len(parents) != len(self.branch_lens) or any(not 0 <= each <= i for i, each in enumerate(parents)):
            raise ValueError(f"parents={parents}: must name a node before each of the {len(self.branch_lens)} branches")
        paths: list[tuple[int, ...]] = [()]
        for parent in parents:
            paths.append((*paths[parent], parent))
        starts = accumulate(lengths, initial=0)
        return tuple(
            Node(start, length, path, index not in parents)
            for index, (start, length, path) in enumerate(zip(starts, lengths, paths, strict=False))
        )


@dataclass(frozen=True)
class PackedRow:
    """One forward pass: N tokens of whole groups, M of them predicted."""

    input_ids: Tensor
    """[1, N] int64."""
    position_ids: Tensor
    """[3, 1, N] int64; every branch restarts after its prompt."""
    pixel_values: Tensor
    """[num_patches, patch_dim]: the videos of the row's groups, in order."""
    video_grid_thw: Tensor
    """[num_videos, 3] int64."""
    layout: tuple[GroupLayout, ...]
    logit_indices: Tensor
    """[M] int64 into the row: the tokens whose hidden states predict `token_ids`."""
    token_ids: Tensor
    """[M] int64: the tokens of all answers, answer after answer."""
    row_ids: Tensor
    """[M] int64: which answer of this row each of them belongs to."""
    vision: VisionFeatures | None = None
    """Features of the row's videos when they are at hand; `pixel_values` are not read then."""
    branch_chunks: tuple[tuple[int, ...], ...] = ()
    """For a group longer than a row: its branch lengths, chunk by chunk, each chunk run by itself after the prompt."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_completions(self) -> int:
        return sum(group.num_leaves for group in self.layout)

    def to(self, device: torch.device | str) -> PackedRow:
        """The same row with every tensor on `device`."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        if self.vision is not None:
            moved["vision"] = self.vision.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class _Segment:
    """One group's share of a row, before concatenation."""

    prompt: Prompt
    branches: tuple[Tensor, ...]
    input_ids: Tensor
    position_ids: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


def pack(
    groups: Sequence[RolloutGroup],
    *,
    config: Any,
    max_tokens_per_row: int,
    mode: PackingMode = "shared_prefix",
) -> list[PackedRow]:
    """Concatenate whole groups into rows of at most `max_tokens_per_row` tokens.

    Order is kept: the answers of row after row are the answers of group after group, whatever the mode. With mode
    "none" every answer becomes a group of its own, with its own copy of the prompt and of the video.

    A group longer than a row gets a row to itself that is run in stages: the prompt, then chunks of answers.

    config: the model's transformers configuration.
    Raises ValueError naming the sample for a prompt or an answer longer than a row and for an empty answer; for an
    unknown mode.
    """
    if mode == "shared_prefix":
        branches = [(group.prompt, [completion.ids for completion in group.completions]) for group in groups]
    elif mode == "none":
        branches = [(group.prompt, [completion.ids]) for group in groups for completion in group.completions]
    else:
        raise ValueError(f"mode={mode!r} is unknown; choose shared_prefix or none")
    return _rows((_segment(prompt, ids, config) for prompt, ids in branches), max_tokens_per_row)


def pack_prompts(prompts: Sequence[Prompt], *, config: Any, max_tokens_per_row: int) -> list[PackedRow]:
    """Rows of prompts without answers, for prefilling; `logit_indices` are the prompts' last tokens."""
    return _rows((_segment(prompt, [], config) for prompt in prompts), max_tokens_per_row)


def idle_row(config: Any, has_features: bool) -> PackedRow:
    """The shortest row that passes through the whole model: a rank that has no row left keeps in step with it.

    has_features: whether rows bring their videos' features, so that the vision tower does not run.
    """
    video = idle_video(config)
    if has_features:
        nothing = torch.zeros(1, config.vision_config.out_hidden_size)
        num_deepstack = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        video = replace(video, features=VisionFeatures(nothing, (nothing,) * num_deepstack))
    ids = torch.tensor([config.vision_start_token_id, config.video_token_id, config.vision_end_token_id])
    sample = Sample("idle", Path("idle"), "", 0.0, ())
    segment = _segment(Prompt(sample, "answer", ids, video), [ids[:1]], config)
    return _concatenate([segment], branch_chunks=())


def idle_video(config: Any) -> VideoPatches:
    """The smallest video that passes through the vision tower: zeros, of a single merged patch."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    pixels = torch.zeros(side**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return VideoPatches(pixels, (1, side, side), 0.0, torch.zeros(1, dtype=torch.float64))


def _segment(prompt: Prompt, branches: Sequence[Tensor], config: Any) -> _Segment:
    if any(len(ids) == 0 for ids in branches):
        raise ValueError(f"sample {prompt.sample.sample_id!r} has an answer without tokens")
    videos = _videos([prompt])
    grids, seconds = [video.grid_thw for video in videos], [video.second_per_grid for video in videos]
    positions, start = mrope_positions(prompt.input_ids, grids, seconds, config)
    branch_positions = [torch.arange(start, start + len(ids)).expand(3, -1) for ids in branches]
    return _Segment(
        prompt=prompt,
        branches=tuple(branches),
        input_ids=torch.cat([prompt.input_ids, *branches]),
        position_ids=torch.cat([positions, *branch_positions], dim=1),
    )


def _videos(prompts: Iterable[Prompt]) -> list[VideoPatches]:
    """A grid without frames stands for a prompt without a video."""
    return [prompt.video for prompt in prompts if prompt.video.grid_thw[0] > 0]


def _rows(segments: Iterable[_Segment], max_tokens_per_row: int) -> list[PackedRow]:
    rows: list[list[_Segment]] = []
    used = 0
    for segment in segments:
        if not rows or used + segment.num_tokens > max_tokens_per_row:
            rows.append([])
            used = 0
        rows[-1].append(segment)
        used += segment.num_tokens
    return [_concatenate(row, _branch_chunks(row[0], max_tokens_per_row)) for row in rows]


def _branch_chunks(segment: _Segment, max_tokens_per_row: int) -> tuple[tuple[int, ...], ...]:
    """Empty unless the group, which then has a row of its own, is longer than a row."""
    if segment.num_tokens <= max_tokens_per_row:
        return ()
    prompt_len, lengths = len(segment.prompt.input_ids), [len(ids) for ids in segment.branches]
    if max(prompt_len, *lengths, 0) > max_tokens_per_row:
        raise ValueError(
            f"sample {segment.prompt.sample.sample_id!r}: its prompt has {prompt_len} tokens and its longest answer "
            f"{max(lengths, default=0)}, each of which must fit max_tokens_per_row={max_tokens_per_row}"
        )
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if sum(chunks[-1]) + length > max_tokens_per_row:
            chunks.append([])
        chunks[-1].append(length)
    return tuple(map(tuple, chunks))


def _concatenate(segments: Sequence[_Segment], branch_chunks: tuple[tuple[int, ...], ...]) -> PackedRow:
    layout = tuple(GroupLayout(len(s.prompt.input_ids), tuple(map(len, s.branches))) for s in segments)
    videos = _videos(segment.prompt for segment in segments)
    branches = [ids for segment in segments for ids in segment.branches]
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedRow(
        input_ids=torch.cat([segment.input_ids for segment in segments])[None],
        position_ids=torch.cat([segment.position_ids for segment in segments], dim=1)[:, None],
        pixel_values=torch.cat([video.pixel_values for video in videos]) if videos else torch.empty(0, 0),
        video_grid_thw=torch.tensor([video.grid_thw for video in videos], dtype=torch.int64).reshape(-1, 3),
        layout=layout,
        logit_indices=_logit_indices(layout),
        token_ids=torch.cat([nothing, *branches]),
        row_ids=torch.cat([nothing, *(torch.full_like(ids, index) for index, ids in enumerate(branches))]),
        vision=_features(videos),
        branch_chunks=branch_chunks,
    )


def _features(videos: Sequence[VideoPatches]) -> VisionFeatures | None:
    features = [video.features for video in videos if video.features is not None]
    if not features:
        return None
    if len(features) < len(videos):
        raise ValueError(f"{len(videos) - len(features)} of a row's {len(videos)} videos lack their features")
    deepstack = zip(*(each.deepstack for each in features), strict=True)
    return VisionFeatures(torch.cat([each.embeds for each in features]), tuple(map(torch.cat, deepstack)))


def _logit_indices(layout: Sequence[GroupLayout]) -> Tensor:
    """A leaf of length n is predicted by its parent's last token and its own first n - 1; a lone prompt by nothing: of
    it the last token predicts what is to come.
    """
    pieces, start = [], 0
    for group in layout:
        ends = [start + node.start + node.length for node in group.nodes]
        for node, end in zip(group.nodes, ends, strict=True):
            if not node.path:
                last = end - 1
            elif node.is_leaf:
                pieces += [torch.tensor([ends[node.path[-1]] - 1]), torch.arange(end - node.length, end - 1)]
        if not group.branch_lens:
            pieces.append(torch.tensor([last]))
        start += group.num_tokens
    return torch.cat(pieces)

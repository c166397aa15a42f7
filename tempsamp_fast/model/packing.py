"""Rows of whole groups: `[prompt | c1 | ... | cG]`, each prompt once for all of its answers, and as a tree
`[video | q1 | q2 | ... | answers]` where several ask about one video.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt, RolloutGroup, Sample, VideoPatches, VisionFeatures
from tempsamp_fast.model.layout import GroupLayout, Node
from tempsamp_fast.model.segments import Segment, segment, segments
from tempsamp_fast.system.device import sent

if TYPE_CHECKING:
    from tempsamp_fast.model.sequence_parallel import Shares

PackingMode = Literal["shared_prefix", "none"]


@dataclass(frozen=True)
class PackedRow:
    """One forward pass: N tokens of whole groups, M of them predicted."""

    input_ids: Tensor
    """[1, N] int64."""
    position_ids: Tensor
    """[3, 1, N] int64; every branch restarts after its prompt."""
    pixel_values: Tensor
    """[num_patches, patch_dim], normalised or uint8: the videos of the row's groups, in order."""
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
    stages: tuple[int, ...] = ()
    """For a tree longer than a row: how many of its nodes, all of one depth, run together, stage after stage."""
    idle_stages: int = 0
    """Further passes through the text layers whose results count for nothing: another rank runs so many more stages."""
    shares: Shares | None = None
    """Of a row that several ranks run together: this is one rank's share, as `sequence_parallel.share_out` makes it."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def num_completions(self) -> int:
        return sum(group.num_leaves for group in self.layout)

    def to(self, device: torch.device | str) -> PackedRow:
        """The same row with every tensor on `device`, but for the grids, which the CPU reads."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        del tensors["video_grid_thw"]
        moved: dict[str, Any] = {name: sent(value, torch.device(device)) for name, value in tensors.items()}
        if self.vision is not None:
            moved["vision"] = self.vision.to(device)
        return replace(self, **moved)


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

    Neighbouring groups about one video (the same `VideoPatches`) become a tree, `[video | q1 | q2 | ... | answers to
    q1 | ...]`: what their prompts share is there once.
    A tree longer than a row gets a row to itself that is run in stages: the video, then chunks of questions, then of
    answers; of a single question its prompt, then chunks of answers.

    config: the model's transformers configuration.
    Raises ValueError naming the sample for a prompt or an answer longer than a row and for an empty answer; for an
    unknown mode.
    """
    return _rows(trees_of(groups, config, max_tokens_per_row, mode), max_tokens_per_row)


def trees_of(
    groups: Sequence[RolloutGroup], config: Any, max_tokens_per_row: int, mode: PackingMode
) -> Iterable[Segment]:
    """What `pack` lays into rows; arguments and errors are the same."""
    for group in groups:
        _check_lengths(group.prompt, [completion.ids for completion in group.completions], max_tokens_per_row)
    if mode == "shared_prefix":
        branches = [(group.prompt, [completion.ids for completion in group.completions]) for group in groups]
        return segments(branches, config)
    if mode != "none":
        raise ValueError(f"mode={mode!r} is unknown; choose shared_prefix or none")
    return (segment(group.prompt, [each.ids], config) for group in groups for each in group.completions)


def pack_prompts(prompts: Sequence[Prompt], *, config: Any, max_tokens_per_row: int) -> list[PackedRow]:
    """Rows of prompts without answers, for prefilling; `logit_indices` are the prompts' last tokens."""
    for prompt in prompts:
        _check_lengths(prompt, [], max_tokens_per_row)
    trees = segments(((prompt, []) for prompt in prompts), config, max_tokens_per_row)
    return _rows(trees, max_tokens_per_row)


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
    idle = segment(Prompt(sample, "answer", ids, video), [ids[:1]], config)
    return _concatenate([idle], stages=())


def idle_video(config: Any) -> VideoPatches:
    """The smallest video that passes through the vision tower: zeros, of a single merged patch."""
    vision = config.vision_config
    side = vision.spatial_merge_size
    pixels = torch.zeros(side**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)
    return VideoPatches(pixels, (1, side, side), 0.0, torch.zeros(1, dtype=torch.float64))


def _rows(trees: Iterable[Segment], max_tokens_per_row: int) -> list[PackedRow]:
    rows: list[list[Segment]] = []
    used = 0
    for tree in trees:
        if not rows or used + tree.num_tokens > max_tokens_per_row:
            rows.append([])
            used = 0
        rows[-1].append(tree)
        used += tree.num_tokens
    return [_concatenate(row, _stages(row[0], max_tokens_per_row)) for row in rows]


def _check_lengths(prompt: Prompt, answers: Sequence[Tensor], max_tokens_per_row: int) -> None:
    longest = max(map(len, answers), default=0)
    if max(len(prompt.input_ids), longest) > max_tokens_per_row:
        raise ValueError(
            f"sample {prompt.sample.sample_id!r}: its prompt has {len(prompt.input_ids)} tokens and its longest answer "
            f"{longest}, each of which must fit max_tokens_per_row={max_tokens_per_row}"
        )


def _stages(tree: Segment, max_tokens_per_row: int) -> tuple[int, ...]:
    """Empty unless the tree, which then has a row of its own, is longer than a row."""
    if tree.num_tokens <= max_tokens_per_row:
        return ()
    stages: list[list[Node]] = [[]]
    for node in tree.layout.nodes:
        is_deeper = stages[-1] and len(node.path) != len(stages[-1][0].path)
        if is_deeper or sum(each.length for each in stages[-1]) + node.length > max_tokens_per_row:
            stages.append([])
        stages[-1].append(node)
    return tuple(map(len, stages))


def _concatenate(trees: Sequence[Segment], stages: tuple[int, ...]) -> PackedRow:
    layout = tuple(tree.layout for tree in trees)
    videos = [video for tree in trees for video in tree.videos]
    answers = [ids for tree in trees for ids in tree.answers]
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedRow(
        input_ids=torch.cat([tree.input_ids for tree in trees])[None],
        position_ids=torch.cat([tree.position_ids for tree in trees], dim=1)[:, None],
        pixel_values=_pixels(videos),
        video_grid_thw=torch.tensor([video.grid_thw for video in videos], dtype=torch.int64).reshape(-1, 3),
        layout=layout,
        logit_indices=_logit_indices(layout) if answers else _last_tokens(trees),
        token_ids=torch.cat([nothing, *answers]),
        row_ids=torch.cat([nothing, *(torch.full_like(ids, index) for index, ids in enumerate(answers))]),
        vision=_features(videos),
        stages=stages,
    )


def _pixels(videos: Sequence[VideoPatches]) -> Tensor:
    """Those of one video as they are, without a copy."""
    if not videos:
        return torch.empty(0, 0)
    dtypes = {video.pixel_values.dtype for video in videos}
    assert len(dtypes) == 1, f"a row's videos have pixels of {dtypes}"
    return videos[0].pixel_values if len(videos) == 1 else torch.cat([video.pixel_values for video in videos])


def _features(videos: Sequence[VideoPatches]) -> VisionFeatures | None:
    features = [video.features for video in videos if video.features is not None]
    if not features:
        return None
    if len(features) < len(videos):
        raise ValueError(f"{len(videos) - len(features)} of a row's {len(videos)} videos lack their features")
    deepstack = zip(*(each.deepstack for each in features), strict=True)
    return VisionFeatures(torch.cat([each.embeds for each in features]), tuple(map(torch.cat, deepstack)))


def _logit_indices(layout: Sequence[GroupLayout]) -> Tensor:
    """A leaf of length n, an answer, is predicted by its parent's last token and its own first n - 1."""
    pieces, start = [], 0
    for group in layout:
        ends = [start + node.start + node.length for node in group.nodes]
        for node, end in zip(group.nodes, ends, strict=True):
            if node.path and node.is_leaf:
                pieces += [torch.tensor([ends[node.path[-1]] - 1]), torch.arange(end - node.length, end - 1)]
        start += group.num_tokens
    return torch.cat(pieces)


def _last_tokens(trees: Sequence[Segment]) -> Tensor:
    """Of every prompt."""
    starts = accumulate((tree.num_tokens for tree in trees), initial=0)
    return torch.cat([start + torch.tensor(tree.last_tokens) for start, tree in zip(starts, trees, strict=False)])

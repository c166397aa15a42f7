"""One packed row on several ranks (DeepSpeed's Ulysses, arXiv 2309.14509): each has a share of its tokens, and for the
attention call a share of the heads of all tokens. The layout of a row does not change.

Frames of a row's videos are encoded by the ranks in equal shares, and each answer's loss is computed by one of them, so
that the losses of all ranks add up to that of the row, and their gradients do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import VisionFeatures
from tempsamp_fast.config.setting import require
from tempsamp_fast.model.attention import PackedAttention
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.packing import PackedRow
from tempsamp_fast.system.device import sent


@dataclass(frozen=True)
class Exchange:
    """Rows of a tensor on their way between the ranks of a group: one exchange, and the same way back for gradients."""

    group: Any
    sent: Tensor
    """int64: which rows of this rank go, receiver after receiver."""
    num_sent: list[int]
    """To every rank."""
    num_received: list[int]
    """From every rank."""
    order: Tensor
    """int64: the rows as they arrive, in the order that they are wanted in."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """[rows here, ...] -> [rows wanted here, ...]."""
        outgoing = tensor.index_select(0, sent(self.sent, tensor.device))
        arrived = _Exchanged.apply(outgoing, self.num_sent, self.num_received, self.group)
        return arrived.index_select(0, sent(self.order, tensor.device))


class _Exchanged(torch.autograd.Function):
    """Rows, receiver after receiver, to rows, sender after sender."""

    @staticmethod
    def forward(ctx: Any, outgoing: Tensor, num_sent: list[int], num_received: list[int], group: Any) -> Tensor:
        ctx.way_back = num_received, num_sent, group
        arrived = outgoing.new_empty(sum(num_received), *outgoing.shape[1:])
        dist.all_to_all_single(arrived, outgoing.contiguous(), num_received, num_sent, group)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchanged.apply(gradient, *ctx.way_back), None, None, None


@dataclass(frozen=True)
class Shares:
    """What this rank does of a row; made on the CPU, where nothing waits for a device."""

    group: Any
    num_ranks: int
    num_tokens: int
    """Of the whole row. Its ranks have equal numbers of them, the last ones filled up."""
    grids: Tensor
    """[videos, 3] int64: the frames that this rank encodes; a video of which it has none is left out."""
    places: Tensor
    """[own placeholders] int64: where they are among this rank's tokens."""
    features: Exchange
    """From the frames' ranks to those of their placeholders."""
    hidden: Exchange
    """From predicting tokens to the rank of their answer."""
    answers: slice
    """Of the row's answers those whose loss this rank computes."""


def sequence_group(size: int) -> Any:
    """The process group of this rank and its neighbours, `size` in all; None for 1. Called by every rank.

    Raises ValueError unless the ranks divide into such groups.
    """
    if size == 1:
        return None
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    require(num_ranks % size == 0, "sequence_parallel_size", size, f"a divisor of the number of ranks, {num_ranks}")
    groups = [dist.new_group(range(first, first + size)) for first in range(0, num_ranks, size)]
    return groups[dist.get_rank() // size]


def check_sequence_parallel(size: int, config: Any) -> None:
    """Raise ValueError where rows of a model cannot be shared out so. config: its transformers configuration."""
    text = config.text_config
    others = sorted({*(getattr(text, "layer_types", None) or ())} - {"full_attention"})
    if size > 1 and others:
        raise ValueError(
            f"sequence_parallel_size={size}: {family_of(config).name} has layers of {', '.join(others)}; set 1"
        )
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    choices = [each for each in range(1, heads + 1) if not heads % each and not (kv_heads % each and each % kv_heads)]
    if size not in choices:
        raise ValueError(
            f"sequence_parallel_size={size}: must divide the model's {heads} heads, and its {kv_heads} key-value heads "
            f"or be a multiple of them; choose one of {', '.join(map(str, choices))}"
        )


def share_out(row: PackedRow, group: Any, config: Any) -> PackedRow:
    """This rank's share of a row that all ranks of the group have whole, on the CPU but for pixels and features.

    Its `token_ids` and `row_ids` are those of its own answers, and `shares` says the rest.
    Raises ValueError for a row that is run in stages.
    """
    if row.stages:
        raise ValueError(
            f"a tree of {row.num_tokens} tokens is longer than max_tokens_per_row, which sequence_parallel_size does "
            "not run in stages; raise it"
        )
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = -(-row.num_tokens // size)
    fill = length * size - row.num_tokens
    own = slice(rank * length, (rank + 1) * length)
    num_answers = row.num_completions
    bounds = [num_answers * each // size for each in range(size + 1)]
    owner = torch.bucketize(row.row_ids, torch.tensor(bounds[1:]), right=True)
    is_mine = owner == rank

    placeholders = (row.input_ids[0] == config.video_token_id).nonzero()[:, 0]
    encoder, encoded_at, grids, patches = _frames(row.video_grid_thw.tolist(), size, rank)
    ours = placeholders[placeholders // length == rank]
    shares = Shares(
        group=group,
        num_ranks=size,
        num_tokens=row.num_tokens,
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        places=ours - own.start,
        features=_exchange(encoder, encoded_at, placeholders // length, rank, size, group),
        hidden=_exchange(row.logit_indices // length, row.logit_indices % length, owner, rank, size, group),
        answers=slice(bounds[rank], bounds[rank + 1]),
    )
    vision = row.vision
    if vision is not None and len(placeholders):
        first = int((placeholders // length < rank).sum())
        vision = vision.map(lambda tensor: tensor[first : first + len(ours)])
    pieces = [row.pixel_values[each] for each in patches]
    return replace(
        row,
        input_ids=torch.nn.functional.pad(row.input_ids, (0, fill))[:, own],
        position_ids=torch.nn.functional.pad(row.position_ids, (0, fill))[..., own],
        pixel_values=torch.cat(pieces) if pieces else row.pixel_values[:0],
        token_ids=row.token_ids[is_mine],
        row_ids=row.row_ids[is_mine] - bounds[rank],
        vision=vision,
        shares=shares,
    )


def _frames(
    grids: Sequence[Sequence[int]], size: int, rank: int
) -> tuple[Tensor, Tensor, list[tuple[int, int, int]], list[slice]]:
    """Of every feature of the videos its rank and its place there; of this rank the grids and their patches."""
    ranks, places, own_grids, patches, start = [], [], [], [], 0
    counts = [0] * size
    for t, h, w in grids:
        bounds = [t * each // size for each in range(size + 1)]
        for each in range(size):
            number = (bounds[each + 1] - bounds[each]) * h * w // 4
            ranks.append(torch.full((number,), each))
            places.append(counts[each] + torch.arange(number))
            counts[each] += number
        if bounds[rank + 1] > bounds[rank]:
            own_grids.append((bounds[rank + 1] - bounds[rank], h, w))
            patches.append(slice(start + bounds[rank] * h * w, start + bounds[rank + 1] * h * w))
        start += t * h * w
    nothing = torch.empty(0, dtype=torch.int64)
    return torch.cat([nothing, *ranks]), torch.cat([nothing, *places]), own_grids, patches


def _exchange(source: Tensor, place: Tensor, goal: Tensor, rank: int, size: int, group: Any) -> Exchange:
    """Of items in the order in which they are wanted: the rank that has each, where there, and the rank it goes to."""
    going, coming = (source == rank).nonzero()[:, 0], (goal == rank).nonzero()[:, 0]
    going = going[goal[going].argsort(stable=True)]
    return Exchange(
        group=group,
        sent=place[going],
        num_sent=goal[going].bincount(minlength=size).tolist(),
        num_received=source[coming].bincount(minlength=size).tolist(),
        order=source[coming].argsort(stable=True).argsort(),
    )


class UlyssesAttention:
    """A `PackedAttention` over a rank's share of the tokens: `inner` meets all tokens of the row with some heads."""

    def __init__(self, inner: PackedAttention, shares: Shares) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._inner, self._shares = inner, shares
        self.recurrence = inner.recurrence
        self._exchanging = DistributedAttention(self._attend, shares.group, scatter_idx=2, gather_idx=1)

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        repeats = max(1, self._shares.num_ranks // key.shape[1])  # every rank has a key-value head
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        key, value = (tensor.repeat_interleave(repeats, dim=2) if repeats > 1 else tensor for tensor in (key, value))
        return self._exchanging(query, key, value, 0, None, layer_index, scaling)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layer_index: int, scaling: float) -> Tensor:
        """[1, tokens, heads, dim] -> the same; what fills the row up attends to nothing and gives zeros."""
        whole = self._shares.num_tokens
        query, key, value = (tensor[:, :whole].transpose(1, 2) for tensor in (query, key, value))
        output = self._inner(layer_index, query, key, value, scaling)
        fill = self._shares.num_ranks * -(-whole // self._shares.num_ranks) - whole
        return torch.nn.functional.pad(output, (0, 0, 0, 0, 0, fill))


def exchange_features(features: VisionFeatures, exchange: Exchange) -> VisionFeatures:
    """From the ranks that encoded frames to those of their placeholders, all levels in one exchange."""
    every = torch.cat([features.embeds, *features.deepstack], dim=1)
    embeds, *deepstack = exchange(every).split(features.embeds.shape[1], dim=1)
    return VisionFeatures(embeds, tuple(deepstack))

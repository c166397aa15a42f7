"""Whole groups, and those about one video together, exchanged between ranks: none waits long for the others."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import Prompt, RolloutGroup, VisionFeatures
from tempsamp_fast.model.segments import by_tree, num_tree_tokens
from tempsamp_fast.system.device import sent
from tempsamp_fast.system.ranks import num_ranks, of_all_ranks, own_rank

MIN_GAIN = 0.05
"""The share by which the largest load must fall for groups to travel: a video is tens of megabytes."""
ALIGNMENT = 16
"""Bytes: what a tensor within a message begins at a multiple of, so that it is read where it lies."""


def balance_prompts(prompts: Sequence[Prompt], config: Any, device: torch.device) -> list[Prompt]:
    """As `balance`, before there are answers: each rank's share of all ranks' prompts. None is left without one."""
    return [group.prompt for group in balance([RolloutGroup(prompt, []) for prompt in prompts], config, device)]


def balance(
    groups: Sequence[RolloutGroup], config: Any, device: torch.device, ranks_together: int = 1
) -> list[RolloutGroup]:
    """This rank's share of all ranks' groups: its own ones if their tokens are even, else some travel, videos and all.

    Neighbours about one video stay together. A rank may be left without a group. Every rank has to call this together:
    one gather tells all ranks how many tokens and bytes each tree has, and one exchange of bytes moves those that go.

    config: the model's transformers configuration.
    device: where collectives take tensors; videos that arrive are there.
    ranks_together: so many neighbouring ranks have the same groups in the end, in the same order.
    """
    if num_ranks() == 1:
        return list(groups)
    trees = by_tree(groups)
    messages = [_message(tree) for tree in trees]
    told = [(num_tree_tokens(tree, config), each.num_bytes) for tree, each in zip(trees, messages, strict=True)]
    by_rank = of_all_ranks(told)
    num_tokens = [[number for number, _ in of_rank] for of_rank in by_rank]
    owners, rank = _owners(num_tokens, ranks_together), own_rank()
    sizes = [[sum(num_bytes) for _, num_bytes in of_rank] for of_rank in by_rank]
    moves = [1 for sender, receivers in enumerate(owners) for each in receivers if {*each} != {sender}]
    arrived = _exchanged(messages, sizes, owners, device) if moves else torch.empty(0)
    mine: list[RolloutGroup] = []
    start = 0
    for sender, receivers in enumerate(owners):
        for index, of_tree in enumerate(receivers):
            if rank in of_tree and rank == sender:
                mine += trees[index]
            elif rank in of_tree:
                mine += _unpacked(arrived[start : start + sizes[sender][index]], by_rank[sender][index][1])
                start += sizes[sender][index]
    return mine


@dataclass(frozen=True)
class _Message:
    """A tree on its way: what is small as a pickle, and its video's tensors, one after the other."""

    parts: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> list[int]:
        """Of every part, filled up to `ALIGNMENT`."""
        return [-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in self.parts]

    def to_bytes(self, device: torch.device) -> list[Tensor]:
        """uint8, to be laid one after the other."""
        laid = []
        for part, num_bytes in zip(self.parts, self.num_bytes, strict=True):
            flat = sent(part.detach(), device).contiguous().view(-1).view(torch.uint8)
            laid += [flat, flat.new_zeros(num_bytes - len(flat))]
        return laid


def _message(tree: Sequence[RolloutGroup]) -> _Message:
    """All still about one and the same video."""
    video = tree[0].prompt.video
    tensors = [video.pixel_values, *((video.features.embeds, *video.features.deepstack) if video.features else ())]
    bare = replace(video, pixel_values=torch.empty(0), features=None)
    groups = [replace(group, prompt=replace(group.prompt, video=bare)) for group in tree]
    shapes = [(tensor.dtype, tensor.shape) for tensor in tensors]
    return _Message((torch.frombuffer(bytearray(pickle.dumps((groups, shapes))), dtype=torch.uint8), *tensors))


def _unpacked(message: Tensor, num_bytes: Sequence[int]) -> list[RolloutGroup]:
    """What `_message` was made of, its video where the message is."""
    start, *starts = accumulate(num_bytes)
    groups, shapes = pickle.loads(bytes(message[:start].cpu().numpy()))
    ends = [start, *starts]
    pixels, *features = (
        message[at : at + dtype.itemsize * shape.numel()].view(dtype).view(shape)
        for at, (dtype, shape) in zip(ends, shapes, strict=False)
    )
    embeds = VisionFeatures(features[0], tuple(features[1:])) if features else None
    video = replace(groups[0].prompt.video, pixel_values=pixels, features=embeds)
    return [replace(group, prompt=replace(group.prompt, video=video)) for group in groups]


def _exchanged(
    messages: Sequence[_Message],
    sizes: Sequence[Sequence[int]],
    owners: Sequence[Sequence[range]],
    device: torch.device,
) -> Tensor:
    """[bytes] uint8: what this rank receives, sender after sender."""
    rank, ranks = own_rank(), range(num_ranks())
    going = [[i for i, receivers in enumerate(owners[rank]) if to in receivers and to != rank] for to in ranks]
    outgoing = [each for to in ranks for i in going[to] for each in messages[i].to_bytes(device)]
    coming = [
        sum(size for size, receivers in zip(sizes[sender], owners[sender], strict=True) if rank in receivers)
        if sender != rank
        else 0
        for sender in ranks
    ]
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    arrived = torch.empty(sum(coming), dtype=torch.uint8, device=device)
    splits = [sum(sizes[rank][i] for i in indices) for indices in going]
    dist.all_to_all_single(arrived, torch.cat([nothing, *outgoing]), coming, splits)
    return arrived


def _owners(num_tokens: Sequence[Sequence[int]], ranks_together: int) -> list[list[range]]:
    """The ranks that each tree goes to, by the rank that has it."""
    starts = range(0, len(num_tokens), ranks_together)
    by_group = [[count for counts in num_tokens[at : at + ranks_together] for count in counts] for at in starts]
    owners = iter([owner for of_group in new_owners(by_group) for owner in of_group])
    groups = [range(start, start + ranks_together) for start in starts]
    return [[groups[next(owners)] for _ in counts] for counts in num_tokens]


def new_owners(num_tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rank that each tree goes to, by the rank that has it.

    num_tokens: of each tree, by rank.
    """
    home = [rank for rank, counts in enumerate(num_tokens) for _ in counts]
    tokens = [count for counts in num_tokens for count in counts]
    shares = assign_groups(tokens, len(num_tokens))
    if max(sum(tokens[group] for group in share) for share in shares) > (1 - MIN_GAIN) * max(map(sum, num_tokens)):
        return [[rank] * len(counts) for rank, counts in enumerate(num_tokens)]
    owners, free = list(home), list(range(len(num_tokens)))
    for share in shares:  # each to the rank that has most of it already
        rank = max(free, key=lambda rank: sum(tokens[group] for group in share if home[group] == rank))
        free.remove(rank)
        for group in share:
            owners[group] = rank
    by_group = iter(owners)
    return [[next(by_group) for _ in counts] for counts in num_tokens]


def assign_groups(num_tokens: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Spread whole groups over ranks so that their tokens are balanced: longest first, to the least loaded rank.

    num_tokens: of each group. Returns the groups' indices by rank, in their given order; at most 4/3 of the best
    possible maximum (Graham 1969).
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, 0, rank) for rank in range(num_ranks)]
    for group in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        load, number, rank = loads[0]
        ranks[rank].append(group)
        heapreplace(loads, (load + num_tokens[group], number + 1, rank))
    return [sorted(groups) for groups in ranks]

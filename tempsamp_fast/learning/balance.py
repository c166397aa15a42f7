"""Whole groups, and those about one video together, exchanged between ranks: none waits long in the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.model.segments import by_tree, num_tree_tokens
from tempsamp_fast.system.ranks import num_ranks, of_all_ranks, own_rank

MIN_GAIN = 0.05
"""The share by which the largest load must fall for groups to travel: a video is tens of megabytes."""


def balance(groups: Sequence[RolloutGroup], config: Any) -> list[RolloutGroup]:
    """This rank's share of all ranks' groups: its own ones if their tokens are even, else some travel, videos and all.

    Neighbours about one video stay together. A rank may be left without a group. Every rank has to call this together.

    config: the model's transformers configuration.
    """
    if num_ranks() == 1:
        return list(groups)
    trees = by_tree(groups)
    num_tokens = of_all_ranks([num_tree_tokens(tree, config) for tree in trees])
    rank = own_rank()
    mine: list[RolloutGroup] = []
    # All ranks go through all transfers in one order, so that no two wait for each other.
    for sender, receivers in enumerate(new_owners(num_tokens)):
        for index, receiver in enumerate(receivers):
            if rank == sender == receiver:
                mine += trees[index]
            elif rank == sender:
                dist.send_object_list([_on_cpu(trees[index])], receiver)
            elif rank == receiver:
                received: list[Any] = [None]
                dist.recv_object_list(received, sender)
                mine += received[0]
    return mine


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
    loads = [0] * num_ranks
    for group in sorted(range(len(num_tokens)), key=lambda index: -num_tokens[index]):
        rank = min(range(num_ranks), key=lambda index: (loads[index], len(ranks[index])))
        ranks[rank].append(group)
        loads[rank] += num_tokens[group]
    return [sorted(groups) for groups in ranks]


def _on_cpu(tree: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """All still about one and the same video."""
    video = tree[0].prompt.video
    features = video.features and video.features.to("cpu")
    video = replace(video, pixel_values=video.pixel_values.cpu(), features=features)
    return [replace(group, prompt=replace(group.prompt, video=video)) for group in tree]

"""What attends to what in a packed row: trees of token spans."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


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

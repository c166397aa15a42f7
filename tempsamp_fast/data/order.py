"""The endless order of training: which sample comes at which position, the same for any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch

from tempsamp_fast.sample import Sample


class TrainingOrder:
    """Every epoch a seeded permutation of its own.

    With `queries_per_video` N above 1 the queries of a video come together: of the permutation, each video's queries in
    bundles of up to N, which fill the positions between two multiples of N. Where no bundle fits what is left of such a
    block, one is cut in two.
    """

    def __init__(self, samples: Sequence[Sample], seed: int, queries_per_video: int = 1) -> None:
        self.samples, self.seed, self.queries_per_video = samples, seed, queries_per_video
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, position: int) -> int:
        """The index of the sample at this position, which may be any from 0 on."""
        epoch, within = divmod(position, len(self.samples))
        if epoch not in self._epochs:
            self._epochs = {known: order for known, order in self._epochs.items() if abs(known - epoch) < 2}
            self._epochs[epoch] = self._order(epoch)
        return self._epochs[epoch][within]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        permutation: list[int] = torch.randperm(len(self.samples), generator=generator).tolist()
        size = self.queries_per_video
        if size == 1:
            return permutation
        first = -epoch * len(permutation) % size  # what is left of the block that the last epoch began
        return together([self.samples[index].video for index in permutation], permutation, size, first)


def together(videos: Sequence[Hashable], items: Sequence[int], size: int, first: int = 0) -> list[int]:
    """Reorder `items` so that those of one video stand together in blocks of `size`, the first block of `first` if any.

    videos: of each item. Bundles keep the order in which their first items come.
    """
    by_video: dict[Hashable, list[int]] = {}
    for video, item in zip(videos, items, strict=True):
        by_video.setdefault(video, []).append(item)
    place = {item: index for index, item in enumerate(items)}
    bundles = [
        of_video[start : start + size] for of_video in by_video.values() for start in range(0, len(of_video), size)
    ]
    bundles.sort(key=lambda bundle: place[bundle[0]])
    waiting: dict[int, deque[list[int]]] = {length: deque() for length in range(1, size + 1)}
    for bundle in bundles:
        waiting[len(bundle)].append(bundle)
    ordered: list[int] = []
    room = first or size
    while len(ordered) < len(items):
        fitting = [queue for length, queue in waiting.items() if length <= room and queue]
        if fitting:
            bundle = min(fitting, key=lambda queue: place[queue[0][0]]).popleft()
        else:
            longer = min((queue for queue in waiting.values() if queue), key=lambda queue: place[queue[0][0]]).popleft()
            bundle, rest = longer[:room], longer[room:]
            waiting[len(rest)].appendleft(rest)
        ordered += bundle
        room = room - len(bundle) or size
    return ordered

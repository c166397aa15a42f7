"""Which sample comes at which position of the training order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.sample import Sample, by_video


def samples_of(queries_by_video: list[int]) -> list[Sample]:
    return [
        Sample(f"{video}/{query}", Path(f"{video}.mp4"), "a query", 9.0, ((1.0, 2.0),))
        for query in range(max(queries_by_video))
        for video, number in enumerate(queries_by_video)
        if query < number
    ]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 9))
def test_every_epoch_has_every_sample_once(queries: list[int], queries_per_video: int, seed: int) -> None:
    samples = samples_of(queries)
    order = TrainingOrder(samples, seed, queries_per_video)
    for epoch in range(3):
        taken = [order[epoch * len(samples) + place] for place in range(len(samples))]
        assert sorted(taken) == list(range(len(samples)))


def test_one_query_a_video_is_the_plain_permutation_of_the_seed() -> None:
    """As runs of earlier versions took them."""
    samples = samples_of([3, 2, 1])
    plain = TrainingOrder(samples, 3)
    assert [plain[i] for i in range(6)] == [2, 5, 4, 0, 3, 1]


@pytest.mark.parametrize("num_videos", [40, 41])
def test_queries_of_a_video_stand_together_in_blocks(num_videos: int) -> None:
    """Blocks lie between multiples of the number, over the ends of epochs too: what a rank takes is made of blocks."""
    samples = samples_of([1 + video % 5 for video in range(num_videos)])
    order = TrainingOrder(samples, 0, 4)
    num_blocks = Counter()
    for block in range(3 * len(samples) // 4):
        videos = Counter(samples[order[position]].video for position in range(4 * block, 4 * block + 4))
        num_blocks.update(videos.keys())
    whole = sum(-(-len(queries) // 4) for queries in by_video(samples))
    assert sum(num_blocks.values()) <= 1.1 * 3 * whole
    plain = TrainingOrder(samples, 0)
    apart = sum(len({samples[plain[4 * block + i]].video for i in range(4)}) for block in range(3 * len(samples) // 4))
    assert apart > 1.5 * sum(num_blocks.values())


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    samples = samples_of([3] * 20)
    order = TrainingOrder(samples, 0, 3)
    first, second, third = ([order[60 * epoch + place] for place in range(60)] for epoch in range(3))
    assert first != second != third != first
    assert first != [TrainingOrder(samples, 1, 3)[place] for place in range(60)]
    assert first == [order[place] for place in range(60)]

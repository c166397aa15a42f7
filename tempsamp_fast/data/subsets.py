"""Parts of a data set: few-shot subsets, filters, and what training and test share."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.sample import Sample

Range = tuple[float, float]
"""(smallest, largest), both included."""

ANY: Range = (-math.inf, math.inf)


def few_shot(
    samples: Sequence[Sample], num_videos: int, seed: int = 0, one_query_per_video: bool = False
) -> list[Sample]:
    """The samples of `num_videos` videos drawn at random, in file order.

    The same seed draws nested subsets: the 50 videos are among the 100. `one_query_per_video` keeps one of a video's
    queries, drawn too. Raises ValueError when there are fewer videos.
    """
    by_video: dict[str, list[Sample]] = {}
    for sample in samples:
        by_video.setdefault(str(sample.video), []).append(sample)
    if not 1 <= num_videos <= len(by_video):
        raise ValueError(f"few_shot_videos={num_videos}: must be between 1 and the {len(by_video)} videos there are")
    order = sorted(by_video)
    rng = random.Random(seed)
    rng.shuffle(order)
    chosen_query = {video: rng.choice(by_video[video]).sample_id for video in order}
    chosen = set(order[:num_videos])
    return [
        sample
        for sample in samples
        if (video := str(sample.video)) in chosen
        and (not one_query_per_video or sample.sample_id == chosen_query[video])
    ]


def within(
    samples: Sequence[Sample], duration_s: Range = ANY, window_s: Range = ANY, difficulty: Range = ANY
) -> list[Sample]:
    """The samples whose video, longest true window and difficulty lie in the given ranges.

    Raises ValueError when `difficulty` is limited but the data set publishes none.
    """
    kept = []
    for sample in samples:
        if difficulty != ANY and sample.difficulty is None:
            raise ValueError(f"difficulty_range={difficulty}: sample {sample.sample_id!r} has no difficulty")
        longest_s = max(end - start for start, end in sample.windows)
        limits = [(sample.duration_s, duration_s), (longest_s, window_s), (sample.difficulty or 0.0, difficulty)]
        if all(low <= value <= high for value, (low, high) in limits):
            kept.append(sample)
    return kept


def shared_videos(train: Sequence[Sample], test: Sequence[Sample]) -> list[str]:
    """Ids of the videos that are in both, sorted: files of one name, but for those that differ in size."""
    learned: dict[str, set[Path]] = {}
    for sample in train:
        learned.setdefault(sample.video_id, set()).add(sample.video)
    asked = {(sample.video_id, sample.video) for sample in test}
    return sorted({name for name, video in asked if any(_may_be(video, other) for other in learned.get(name, ()))})


def _may_be(video: Path, other: Path) -> bool:
    return video == other or not (video.is_file() and other.is_file() and video.stat().st_size != other.stat().st_size)

"""Random stretches of training videos, as if the files had been cut there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.data.prompts import SHORTEST_S
from tempsamp_fast.sample import Sample


def crop(
    samples: Sequence[Sample], video: VideoPatches, generator: torch.Generator
) -> tuple[list[Sample], VideoPatches]:
    """A random stretch of a video that still holds every true span of these queries, as if the file had been cut there.

    It starts and ends between two temporal patches, or with the file; spans, duration and timestamps count from its
    start.
    """
    grid_t, height, width = video.grid_thw
    second = video.second_per_grid
    windows = [window for sample in samples for window in sample.windows]
    ends_s = [sample.duration_s - SHORTEST_S for sample in samples]
    latest_start = int(min(*ends_s, *(start for start, _ in windows)) / second)
    earliest_end = math.ceil(max(end for _, end in windows) / second)
    first = int(torch.randint(min(latest_start, grid_t - 1) + 1, (), generator=generator))
    last = int(torch.randint(min(earliest_end, grid_t), grid_t + 1, (), generator=generator))
    last = max(last, first + 1)
    shift_s = first * second
    features = video.features

    def cut(rows: Tensor) -> Tensor:
        return rows[first * (len(rows) // grid_t) : last * (len(rows) // grid_t)]

    stretch = dataclasses.replace(
        video,
        pixel_values=cut(video.pixel_values),
        grid_thw=(last - first, height, width),
        timestamps_s=video.timestamps_s[first:last] - shift_s,
        features=features and features.map(cut),  # no temporal patch sees another in the tower
        is_whole=False,
    )
    moved = [
        dataclasses.replace(
            sample,
            duration_s=min(math.inf if last == grid_t else (last - first) * second, sample.duration_s - shift_s),
            windows=tuple((start - shift_s, end - shift_s) for start, end in sample.windows),
        )
        for sample in samples
    ]
    return moved, stretch

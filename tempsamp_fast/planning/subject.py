"""What a plan is about: the training samples as far as they are known, and the memory that their largest takes."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.config import Config, DataConfig, ModelConfig, parse_phases
from tempsamp_fast.data.catalogue import DATASETS, find_annotations, load_training_data
from tempsamp_fast.embedded.data import embedded_videos
from tempsamp_fast.embedded.videos import draw_videos
from tempsamp_fast.model.architectures import Parameters, count_parameters, model_config
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.planning.estimate import (
    FRAME_SIZE,
    Memory,
    Work,
    gathered_rollout,
    largest,
    num_frames,
    step_memory,
    video_grid,
    work_of,
)
from tempsamp_fast.sample import by_video


@dataclass(frozen=True)
class Data:
    """What is known of the training samples."""

    num_samples: int | None
    durations_s: tuple[float, ...]
    """One per sample; empty where only counts are known."""
    note: str
    queries: tuple[float, ...] = (1.0,)
    """Of each video; where only counts are known, their mean alone."""

    def together(self, most: int) -> float:
        """Queries of a video that are asked together where at most so many are, on average."""
        return sum(self.queries) / sum(math.ceil(number / most) for number in self.queries)


def are_here(data: DataConfig) -> bool:
    """Whether the training annotations, if a file, can be read on this machine."""
    dataset = DATASETS.get(data.annotations)
    assert data.videos is not None
    try:
        return bool(find_annotations(dataset, Path(data.videos))) if dataset else Path(data.annotations).is_file()
    except ValueError:
        return False


def training_data(data: DataConfig) -> Data:
    """From the annotations where they are, from published counts where they are not."""
    if data.annotations == "synthetic":
        videos = draw_videos(embedded_videos(data))["train"]
        durations = [video.annotation["duration"] for video in videos for _ in video.annotation["sentences"]]
        queries = tuple(float(len(video.annotation["sentences"])) for video in videos)
        return Data(len(durations), tuple(durations), "the embedded data set", queries)
    dataset = DATASETS.get(data.annotations)
    if are_here(data):
        samples, _ = load_training_data(dataclasses.replace(data, eval_annotations=None, eval_videos=None))
        queries = tuple(float(len(of_video)) for of_video in by_video(samples))
        durations = [sample.duration_s for sample in samples]
        return Data(len(samples), tuple(durations), f"read from {data.annotations}", queries)
    missing = f"{data.annotations} is not here"
    if dataset is None or dataset.num_queries is None:
        return Data(None, (), f"{missing}, and no counts are published")
    per_video = dataset.num_queries / (dataset.num_videos or dataset.num_queries)
    if data.few_shot_videos is None:
        return Data(dataset.num_queries, (), f"{missing}: published count, filters left aside", (per_video,))
    per_video = 1.0 if data.few_shot_queries == "one" else per_video
    number = round(per_video * data.few_shot_videos)
    return Data(number, (), f"{missing}: mean of the published counts", (per_video,))


def video_grids(data: DataConfig, found: Data, config: Any) -> list[tuple[int, int, int]]:
    """The grids of all samples; where durations are not known, of every possible number of frames."""
    geometry = geometry_of(config, data.min_pixels, data.max_pixels, data.total_pixels)
    if found.durations_s:
        counts = [num_frames(duration_s, data) for duration_s in found.durations_s]
    else:
        counts = list(range(data.min_frames, data.max_frames + 1, 2))
    by_count = {count: video_grid(geometry, count, FRAME_SIZE) for count in set(counts)}
    return [by_count[count] for count in counts]


def value_size(model: ModelConfig) -> int:
    """Bytes of a weight: 4 in fp32 as asked for, or by `auto` for a model of one's own on a machine without a GPU."""
    is_own = model.model == "tiny" or Path(model.model).exists()
    on_cpu = model.dtype == "auto" and is_own and not torch.cuda.is_available()
    return 4 if model.dtype == "float32" or on_cpu else 2


def peak_memory(config: Config, world_size: int, found: Data | None = None) -> Memory:
    """Of the phase that takes most, with every answer as long as it may be. found: None reads the annotations."""
    every = [step_memory(*each, config, value_size(config.model), world_size) for each in _works(config, found)]
    return max(every, key=lambda memory: memory.total)


def rollout_memory(config: Config, world_size: int) -> float:
    """Bytes of the rollout that takes most where it holds all weights whole under ZeRO-3; arguments as above."""
    return max(gathered_rollout(*each, config, value_size(config.model), world_size) for each in _works(config))


def _works(config: Config, found: Data | None = None) -> list[tuple[Work, Any, Parameters]]:
    """The largest prompt, by the method of each phase, with the model's configuration and parameters."""
    shape = model_config(config.model)
    grid = largest(video_grids(config.data, found or training_data(config.data), shape))
    parameters, methods = count_parameters(shape, config.model), {p.method for p in parse_phases(config.train.phases)}
    most = config.rollout.num_generations, config.rollout.max_completion_length
    return [(work_of(grid, shape, method, *most), shape, parameters) for method in methods]


def with_stage(config: Config, stage: int) -> Config:
    """The same settings under another ZeRO stage, without offload and without DeepSpeed settings by file."""
    changed = copy.deepcopy(config)
    zero: dict[str, Any] = {"zero_stage": str(stage), "offload": "none", "deepspeed_config": None}
    changed.train = dataclasses.replace(changed.train, **zero)
    return changed

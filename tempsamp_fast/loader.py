"""Prompts in training order: which sample comes at which step, its video decoded once and kept while memory lasts."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from tempsamp_fast.batch import Prompt, VideoPatches
from tempsamp_fast.chat import Chat
from tempsamp_fast.config import DataConfig
from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.video import Geometry, Sampling, load_videos, normalise_rows
from tempsamp_fast.video.patch_cache import PatchCache


def sample_index(position: int, num_samples: int, seed: int) -> int:
    """The sample at a position of the endless training order: every epoch its own seeded permutation."""
    epoch, within = divmod(position, num_samples)
    return _epoch_order(epoch, num_samples, seed)[within]


@lru_cache(maxsize=2)
def _epoch_order(epoch: int, num_samples: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_samples, generator=generator).tolist()


def crop(sample: Sample, video: VideoPatches, generator: torch.Generator) -> tuple[Sample, VideoPatches]:
    """A random stretch of the video that still holds every true span, as if the file had been cut there.

    It starts and ends between two temporal patches; spans, duration and timestamps count from its start.
    """
    grid_t, height, width = video.grid_thw
    second = video.second_per_grid
    latest_start = int(min(start for start, _ in sample.windows) / second)
    earliest_end = math.ceil(max(end for _, end in sample.windows) / second)
    first = int(torch.randint(min(latest_start, grid_t - 1) + 1, (), generator=generator))
    last = int(torch.randint(min(earliest_end, grid_t), grid_t + 1, (), generator=generator))
    last = max(last, first + 1)
    shift_s = first * second
    stretch = dataclasses.replace(
        video,
        pixel_values=video.pixel_values[first * height * width : last * height * width],
        grid_thw=(last - first, height, width),
        timestamps_s=video.timestamps_s[first:last] - shift_s,
    )
    moved = dataclasses.replace(
        sample,
        duration_s=min((last - first) * second, sample.duration_s - shift_s),
        windows=tuple((start - shift_s, end - shift_s) for start, end in sample.windows),
    )
    return moved, stretch


class PromptLoader:
    """Turns samples into prompts; decoded videos are kept as uint8 patches up to `video_cache_gib`.

    With `on_bad_video="skip"` a sample whose video fails is replaced by the next good one and listed in `skipped`;
    with `raise` its VideoError names the file.
    """

    def __init__(self, chat: Chat, geometry: Geometry, config: DataConfig):
        self.chat = chat
        self.geometry = geometry
        self.config = config
        self.sampling = Sampling(config.sampling, config.fps, config.min_frames, config.max_frames)
        self.skipped: dict[Path, str] = {}
        self._videos: OrderedDict[Path, VideoPatches] = OrderedDict()
        self._cached_bytes = 0
        self._disk = PatchCache(Path(config.patch_cache), geometry) if config.patch_cache else None
        # Training prompts are made in a prefetch thread while the main thread may be evaluating.
        self._lock = threading.RLock()

    def prompts(self, samples: Sequence[Sample], modes: Sequence[Mode]) -> list[Prompt]:
        """One prompt per sample whose video could be read, in order."""
        with self._lock:
            self._decode([sample.video for sample in samples])
            prompts = [
                self._prompt(sample, mode, self._videos[sample.video])
                for sample, mode in zip(samples, modes, strict=True)
                if sample.video not in self.skipped
            ]
            self._evict()
        return prompts

    def training_prompts(
        self, samples: Sequence[Sample], positions: Sequence[int], modes: Sequence[Mode], seed: int
    ) -> list[Prompt]:
        """The prompts at these positions of the training order: bad videos replaced by the samples that follow, a share
        `random_crop` of the videos cropped.
        """
        chosen = [sample_index(position, len(samples), seed) for position in positions]
        with self._lock:
            self._decode([samples[index].video for index in chosen])
            prompts = []
            for index, position, mode in zip(chosen, positions, modes, strict=True):
                sample = self._good(samples, index)
                video = self._videos[sample.video]
                generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
                if torch.rand((), generator=generator) < self.config.random_crop:
                    sample, video = crop(sample, video, generator)
                prompts.append(self._prompt(sample, mode, video))
            self._evict()
        return prompts

    def _prompt(self, sample: Sample, mode: Mode, video: VideoPatches) -> Prompt:
        pixels = normalise_rows(video.pixel_values, self.geometry)
        return self.chat.prompt(sample, mode, self.config.task, dataclasses.replace(video, pixel_values=pixels))

    def _good(self, samples: Sequence[Sample], index: int) -> Sample:
        for offset in range(len(samples)):
            sample = samples[(index + offset) % len(samples)]
            self._decode([sample.video])
            if sample.video not in self.skipped:
                return sample
        raise ValueError(
            f"none of the {len(samples)} samples has a readable video; {next(iter(self.skipped.values()))}"
        )

    def _decode(self, paths: Sequence[Path]) -> None:
        wanted = [path for path in dict.fromkeys(paths) if path not in self.skipped]
        for path in wanted:
            if path in self._videos:
                self._videos.move_to_end(path)
            elif self._disk and (stored := self._disk.get(path, self.sampling)):
                self._keep(path, stored)
        missing = [path for path in wanted if path not in self._videos]
        if not missing:
            return
        batch = load_videos(
            [(path, self.sampling) for path in missing],
            self.geometry,
            backend=self.config.video_backend,
            dtype=torch.uint8,
            on_error=self.config.on_bad_video,
        )
        for path, video, result in zip(missing, batch.split(), batch.results, strict=True):
            if video is None:
                self.skipped[path] = result.message
                continue
            # A copy of its own: a view would keep the whole batch in memory.
            self._keep(path, dataclasses.replace(video, pixel_values=video.pixel_values.clone()))
            if self._disk:
                self._disk.put(path, self.sampling, self._videos[path])

    def _keep(self, path: Path, video: VideoPatches) -> None:
        self._videos[path] = video
        self._cached_bytes += video.pixel_values.nbytes

    def _evict(self) -> None:
        while self._cached_bytes > self.config.video_cache_gib * 2**30:
            _, video = self._videos.popitem(last=False)
            self._cached_bytes -= video.pixel_values.nbytes

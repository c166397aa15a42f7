"""Prompts in training order, the video of each decoded once and kept while memory lasts.

Of a frozen tower, its features may be kept instead: their video is neither decoded nor encoded again.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path

import torch

from tempsamp_fast.batch import Prompt, VideoPatches
from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.crop import crop
from tempsamp_fast.data.frame_folder import load_frame_folder
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.system.device import training_device
from tempsamp_fast.video import Geometry, Sampling, VideoError, load_videos
from tempsamp_fast.video.patch_cache import PatchCache

LENGTH_TOLERANCE = 0.05
"""Share of its annotated duration that a video may be longer or shorter, but at least a second."""
logger = logging.getLogger(__name__)
View = tuple[Sample, VideoPatches]
"""A query, and what of its video it is asked about: spans count from the beginning of that."""


class PromptLoader:
    """Turns samples into prompts; decoded videos are kept as uint8 patches up to `video_cache_gib`.

    tower: the fingerprint of a frozen vision tower whose features `keep_features` may put in place of patches; empty:
        they are not kept.

    max_prompt_tokens: a longer prompt is as bad as a video that fails.

    num_threads: that decode on the CPU; None: as many as it has cores for this process.

    With `on_bad_sample="skip"` a bad sample is replaced by the next good one, and its video or name listed in
    `skipped`; more than `max_bad_videos` of them in one epoch raise ValueError. With `raise` its error names it.
    """

    def __init__(
        self,
        chat: Chat,
        geometry: Geometry,
        config: DataConfig,
        tower: str = "",
        max_prompt_tokens: int | None = None,
        num_threads: int | None = None,
    ):
        self.chat, self.geometry, self.config = chat, geometry, config
        self.max_prompt_tokens = max_prompt_tokens
        self.sampling = Sampling(config.sampling, config.fps, config.min_frames, config.max_frames)
        self.skipped: dict[Path | str, str] = {}
        """Why, by video, or by the sample's id where the prompt is too long."""
        self.replaced: Counter[int] = Counter()
        """Training samples that this process replaced for a bad one, by epoch."""
        self._told: set[Path] = set()
        self._videos: OrderedDict[Path, VideoPatches] = OrderedDict()
        folder = Path(config.patch_cache) if config.patch_cache else None
        self._disk = PatchCache(folder, geometry) if folder else None
        self._features_disk = PatchCache(folder, geometry, tower) if folder and tower else None
        self._index_folder = folder / "indexes" if folder else None
        if self._index_folder:
            self._index_folder.mkdir(exist_ok=True)
        self._keeps_features = bool(tower)
        self._encoded: deque[tuple[Path, VideoPatches]] = deque()
        # Training prompts are made in a prefetch thread while the main thread may be evaluating.
        self._lock = threading.RLock()
        gpu = training_device() if config.video_device != "cpu" and torch.cuda.is_available() else None
        self._device = str(gpu or config.video_device)
        self._num_threads = None if gpu else num_threads
        self._stream = torch.cuda.Stream(gpu) if gpu else None

    def keep_features(self, prompts: Sequence[Prompt]) -> None:
        """Keep the features of whole videos for further prompts about them; the loading thread takes them in."""
        if not self._keeps_features:
            return
        for path, video in {prompt.sample.video: prompt.video for prompt in prompts}.items():
            kept = self._videos.get(path)
            if video.features is not None and video.is_whole and (kept is None or kept.features is None):
                self._encoded.append((path, dataclasses.replace(video, features=video.features.to("cpu"))))

    def prompts(self, samples: Sequence[Sample], modes: Sequence[Mode]) -> list[Prompt]:
        """One prompt per good sample, in order."""
        with self._lock:
            self._decode([sample.video for sample in samples])
            for sample in samples:
                if sample.video not in self.skipped:
                    self._compare_lengths(sample)
            prompts = [
                prompt
                for sample, mode in zip(samples, modes, strict=True)
                if sample.video not in self.skipped
                and (prompt := self._prompt(sample, mode, self._videos[sample.video]))
            ]
            self._evict()
        return prompts

    def training_prompts(self, order: TrainingOrder, positions: Sequence[int], modes: Sequence[Mode]) -> list[Prompt]:
        """The prompts at these positions of the training order: bad samples replaced by those that follow, a share
        `random_crop` of the videos cropped; queries that the order keeps together share one stretch.
        """
        chosen = [order[position] for position in positions]
        with self._lock:
            self._decode([order.samples[index].video for index in chosen])
            together: dict[tuple[int, Path], list[int]] = {}
            for place, (index, position) in enumerate(zip(chosen, positions, strict=True)):
                together.setdefault((position // order.queries_per_video, order.samples[index].video), []).append(place)
            views: dict[int, View] = {}
            for (_, path), places in together.items():
                if path not in self.skipped:
                    of_video = [order.samples[chosen[place]] for place in places]
                    seen = self._seen(of_video, order.seed, positions[places[0]])
                    views |= dict(zip(places, seen, strict=True))
            prompts = []
            for place, (index, position, mode) in enumerate(zip(chosen, positions, modes, strict=True)):
                prompt = self._first_good(order, index, position, mode, views.get(place))
                if prompt.is_replacement:
                    self._count_bad(position // len(order.samples), order.samples[index])
                prompts.append(prompt)
            self._evict()
        return prompts

    def _first_good(
        self,
        order: TrainingOrder,
        index: int,
        position: int,
        mode: Mode,
        view: View | None,
    ) -> Prompt:
        """Of the samples from `index` on, whose own `view` is at hand unless its video is bad."""
        if view and (prompt := self._prompt(view[0], mode, view[1])):
            return prompt
        samples = order.samples
        for offset in range(1, len(samples)):
            sample = samples[(index + offset) % len(samples)]
            self._decode([sample.video])
            if sample.video in self.skipped:
                continue
            ((sample, video),) = self._seen([sample], order.seed, position)
            if prompt := self._prompt(sample, mode, video):
                return dataclasses.replace(prompt, is_replacement=True)
        raise ValueError(
            f"none of the {len(samples)} samples has a readable video and a prompt that fits a row; "
            f"{next(iter(self.skipped.values()))}"
        )

    def _seen(self, samples: Sequence[Sample], seed: int, position: int) -> list[View]:
        """What queries about one video are asked about: the whole of it, or one stretch for all of them."""
        for sample in samples:
            self._compare_lengths(sample)
        video = self._videos[samples[0].video]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        if torch.rand((), generator=generator) >= self.config.random_crop:
            return [(sample, video) for sample in samples]
        moved, stretch = crop(samples, video, generator)
        return [(sample, stretch) for sample in moved]

    def _compare_lengths(self, sample: Sample) -> None:
        """Warn once of a video that does not last as long as it is annotated to."""
        video = self._videos[sample.video]
        length_s, annotated_s = video.grid_thw[0] * video.second_per_grid, sample.duration_s
        tolerance_s = max(1.0 + video.second_per_grid, LENGTH_TOLERANCE * annotated_s)
        if annotated_s > 0 and abs(length_s - annotated_s) > tolerance_s and sample.video not in self._told:
            self._told.add(sample.video)
            logger.warning(
                "%s: lasts about %.1f s, but is annotated as %.1f s: spans may point beside what they name",
                sample.video, length_s, annotated_s,
            )  # fmt: skip

    def _prompt(self, sample: Sample, mode: Mode, video: VideoPatches) -> Prompt | None:
        """None where it is too long and `on_bad_sample` is to skip it."""
        prompt = self.chat.prompt(sample, mode, self.config.task, video)
        if self.max_prompt_tokens is None or len(prompt.input_ids) <= self.max_prompt_tokens:
            return prompt
        reason = (
            f"sample {sample.sample_id[:80]!r} of {sample.video}: its prompt of {len(prompt.input_ids)} tokens is "
            f"longer than max_tokens_per_row={self.max_prompt_tokens}"
        )
        if self.config.on_bad_sample == "raise":
            raise ValueError(f"{reason}; raise that, or leave such samples out with --on_bad_sample skip")
        self.skipped[sample.sample_id] = reason
        return None

    def _count_bad(self, epoch: int, sample: Sample) -> None:
        self.replaced[epoch] += 1
        number, most = self.replaced[epoch], self.config.max_bad_videos
        logger.warning("epoch %d: sample %r replaced (%d so far): %s", epoch, sample.sample_id, number, sample.video)
        if most is not None and number > most:
            reason = self.skipped.get(sample.video) or self.skipped[sample.sample_id]
            raise ValueError(f"epoch {epoch} has {number} bad videos (max_bad_videos={most}); the last one: {reason}")

    def _decode(self, paths: Sequence[Path]) -> None:
        while self._encoded:
            path, encoded = self._encoded.popleft()
            self._keep(path, encoded)
            if self._features_disk:
                self._features_disk.put(path, self.sampling, encoded)
        wanted = [path for path in dict.fromkeys(paths) if path not in self.skipped]
        disks = [disk for disk in (self._features_disk, self._disk) if disk]
        for path in wanted:
            if path in self._videos:
                self._videos.move_to_end(path)
            elif stored := next((found for disk in disks if (found := disk.get(path, self.sampling))), None):
                self._keep(path, stored)
        for path in [path for path in wanted if path not in self._videos and path.is_dir()]:
            try:
                self._keep(path, load_frame_folder(path, self.sampling, self.geometry))
                if self._disk:
                    self._disk.put(path, self.sampling, self._videos[path])
            except VideoError as error:
                if self.config.on_bad_sample == "raise":
                    raise
                self.skipped[path] = str(error)
        missing = [path for path in wanted if path not in self._videos and path not in self.skipped]
        if not missing:
            return
        # Kept in host memory, decoded in a stream of its own: training does not wait for it, nor it for training.
        with torch.cuda.stream(self._stream):
            batch = load_videos(
                [(path, self.sampling) for path in missing],
                self.geometry,
                backend=self.config.video_backend,
                device=self._device,
                dtype=torch.uint8,
                on_error=self.config.on_bad_sample,
                num_threads=self._num_threads,
                index_folder=self._index_folder,
            )
            for path, video, result in zip(missing, batch.split(), batch.results, strict=True):
                if video is None:
                    self.skipped[path] = result.message
                    continue
                # A copy of its own: a view would keep the whole batch in memory.
                pixels = video.pixel_values.to("cpu", copy=True)
                self._keep(path, dataclasses.replace(video, pixel_values=pixels))
                if self._disk:
                    self._disk.put(path, self.sampling, self._videos[path])

    def _keep(self, path: Path, video: VideoPatches) -> None:
        self._videos[path] = video
        self._videos.move_to_end(path)

    def _evict(self) -> None:
        excess = sum(video.nbytes for video in self._videos.values()) - self.config.video_cache_gib * 2**30
        while excess > 0:
            _, video = self._videos.popitem(last=False)
            excess -= video.nbytes

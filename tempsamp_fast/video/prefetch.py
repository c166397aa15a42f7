"""Videos decoded ahead of the training step, in a thread that never holds the interpreter lock for long."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.prefetch import Prefetch
from tempsamp_fast.video import BackendName, Geometry, OnError, Sampling, VideoError, load_videos
from tempsamp_fast.video.patch_cache import PatchCache


@dataclass(frozen=True)
class LoadedVideos:
    """The different videos of one batch; every wanted path is in exactly one of the two."""

    patches: dict[Path, VideoPatches]
    """uint8 rows, for `normalise_rows`; shared by all queries about a video."""
    errors: dict[Path, VideoError]
    """Why a video is missing; empty with `on_error="raise"`."""


class VideoLoader(Prefetch[LoadedVideos]):
    """Iterates over batches of videos, up to `depth` of them decoded ahead; each video of a batch is decoded once.

        with VideoLoader(batches_of_paths, Sampling(), geometry) as loader:
            for videos in loader:
                step(videos.patches)
        print(loader.blocked_s)

    Leaving the `with` block ends the thread after the videos it is at. Not to be used in a process forked after it was
    made (RuntimeError): make it there.

    Args:
        batches: paths wanted together; consumed in the thread, paths may repeat.
        depth: batches kept ready.
        cache_folder: keep whole videos there as uint8 patches; None for no cache on disk.
        on_error, backend, num_threads, deadline_s: see `load_videos`.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Path]],
        sampling: Sampling,
        geometry: Geometry,
        *,
        depth: int = 2,
        cache_folder: Path | None = None,
        on_error: OnError = "raise",
        backend: BackendName = "auto",
        num_threads: int | None = None,
        deadline_s: float = 60.0,
    ):
        self._sampling = sampling
        self._geometry = geometry
        self._cache = PatchCache(cache_folder, geometry) if cache_folder is not None else None
        self._on_error = on_error
        self._backend = backend
        self._num_threads = num_threads
        self._deadline_s = deadline_s
        self._process = os.getpid()
        super().__init__(map(self._load, batches), depth)

    def __next__(self) -> LoadedVideos:
        if os.getpid() != self._process:
            raise RuntimeError("a VideoLoader does not survive a fork: make it in the process that uses it")
        return super().__next__()

    def _load(self, batch_paths: Sequence[Path]) -> LoadedVideos:
        paths = list(dict.fromkeys(batch_paths))
        loaded = LoadedVideos({}, {})
        if self._cache is not None:
            stored = {path: self._cache.get(path, self._sampling) for path in paths}
            loaded.patches.update((path, patches) for path, patches in stored.items() if patches is not None)
        missing = [path for path in paths if path not in loaded.patches]
        batch = load_videos(
            [(path, self._sampling) for path in missing],
            self._geometry,
            backend=self._backend,
            dtype=torch.uint8,
            on_error=self._on_error,
            num_threads=self._num_threads,
            deadline_s=self._deadline_s,
        )
        for path, patches, result in zip(missing, batch.split(), batch.results, strict=True):
            if patches is None:
                loaded.errors[path] = result.error()
                continue
            loaded.patches[path] = patches
            if self._cache is not None and result.status == "ok":
                self._cache.put(path, self._sampling, patches)
        return loaded

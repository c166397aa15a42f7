"""Decoded videos kept on disk as uint8 patches, about a quarter of float32, or as what a frozen tower made of them."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from tempsamp_fast.batch import VideoPatches, VisionFeatures
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.sampling import Sampling

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of every key: raise it when the meaning of the stored patches changes."""


class PatchCache:
    """A folder of patches, safe for several processes; an entry is for one state of the file and the settings.

    tower: the fingerprint of the vision tower whose features are kept; empty for a cache of pixels.

    Nothing is ever deleted: the folder is the user's, and may be removed at any time.
    """

    def __init__(self, folder: Path, geometry: Geometry, tower: str = ""):
        self.folder = folder
        self.geometry = geometry
        self.tower = tower
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, video: Path, sampling: Sampling) -> VideoPatches | None:
        """The patches of a video (uint8) or its features, None where they are not stored or cannot be read."""
        entry = self._entry(video, sampling)
        if entry is None or not entry.is_file():
            return None
        try:
            stored = torch.load(entry, weights_only=True)
            if stored["features"] is not None:
                embeds, *deepstack = stored["features"]
                stored["features"] = VisionFeatures(embeds, tuple(deepstack))
            patches = VideoPatches(**stored)
            if not _is_whole(patches):
                raise TypeError("its parts do not fit each other")
            return patches
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            log.warning("%s: unreadable patches are made again (%s)", entry, error)
            return None

    def put(self, video: Path, sampling: Sampling, patches: VideoPatches) -> None:
        """Store the patches of a video that loaded whole; a full disk is logged, not raised."""
        entry = self._entry(video, sampling)
        if entry is None:
            return
        assert patches.pixel_values.dtype == torch.uint8 or patches.features is not None
        features = patches.features and [patches.features.embeds, *patches.features.deepstack]
        draft = entry.with_suffix(f".{os.getpid()}")
        fields = {**vars(patches), "pixel_values": patches.pixel_values.clone(), "features": features}
        try:
            with draft.open("xb") as file:
                torch.save(fields, file)
            draft.replace(entry)
        except (OSError, RuntimeError) as error:
            draft.unlink(missing_ok=True)
            log.warning("%s: patches of %s are not stored (%s)", self.folder, video, error)

    def _entry(self, video: Path, sampling: Sampling) -> Path | None:
        """Where the patches are or would be; None for a file that is not there."""
        try:
            found = [path.stat() for path in (video, *_parts(video))]
        except OSError:
            return None
        states = [(each.st_size, each.st_mtime_ns) for each in found]
        key = repr((FORMAT, str(video.absolute()), states, sampling, self.geometry))
        return self.folder / f"{hashlib.sha256((key + self.tower).encode()).hexdigest()[:32]}.pt"


def _parts(video: Path) -> list[Path]:
    """What decides beside it what a video shows: of a folder of frames its files, and the frame rate above it."""
    if not video.is_dir():
        return []
    above = video.parent / "fps.txt"
    return [*sorted(video.iterdir()), *([above] if above.is_file() else [])]


def _is_whole(patches: VideoPatches) -> bool:
    """Whether an entry is one that `put` could have made."""
    pixels, grid, times = patches.pixel_values, patches.grid_thw, patches.timestamps_s
    is_grid = isinstance(grid, tuple) and len(grid) == 3 and all(type(size) is int and size > 0 for size in grid)
    features = (patches.features.embeds, *patches.features.deepstack) if patches.features else ()
    is_typed = all(isinstance(part, Tensor) for part in (pixels, times, *features)) and pixels.ndim == 2
    is_second = type(patches.second_per_grid) is float and 0 < patches.second_per_grid < math.inf
    return is_grid and is_typed and is_second and len(times) == grid[0] and len(pixels) in (0, math.prod(grid))

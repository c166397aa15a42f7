"""Decoded videos kept on disk as uint8 patches, about a quarter of float32, or as what a frozen tower made of them."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from pathlib import Path

import torch

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
        if entry is None or not entry.exists():
            return None
        try:
            stored = torch.load(entry, weights_only=True)
            if stored["features"] is not None:
                embeds, *deepstack = stored["features"]
                stored["features"] = VisionFeatures(embeds, tuple(deepstack))
            return VideoPatches(**stored)
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
            state = video.stat()
        except OSError:
            return None
        key = repr((FORMAT, str(video.absolute()), state.st_size, state.st_mtime_ns, sampling, self.geometry))
        return self.folder / f"{hashlib.sha256((key + self.tower).encode()).hexdigest()[:32]}.pt"

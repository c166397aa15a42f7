"""The one interface behind `load_videos`: a function that decodes requests into packed patches."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.result import Limits, VideoResult
from tempsamp_fast.video.sampling import Sampling

Request = tuple[Path, Sampling]
"""An absolute path and the frames wanted of it."""


def usable_cores() -> int:
    """Processors that this process may run on: the threads that `num_threads` None stands for on the CPU."""
    return len(os.sched_getaffinity(0))


@cache
def why_no_extension() -> str:
    """Why the C++ extension cannot be used, empty where it can: its file may be there and still not load."""
    try:
        importlib.import_module("tempsamp_fast._video")
    except ModuleNotFoundError:
        return "the extension tempsamp_fast._video is not built"
    except ImportError as error:
        return f"the extension tempsamp_fast._video does not load ({error})"
    return ""


@dataclass(frozen=True)
class LoadOptions:
    """How requests are decoded, whatever they are."""

    keep_partial: bool
    """Keep the good frames of a damaged or truncated video as status `partial`; else it fails."""
    num_threads: int | None
    """At least 1; files (or parts of them) decoded at the same time. None: as suits the machine."""
    deadline_s: float
    """Seconds for each request from its own start; `inf` for none. Past it the request fails with `DEADLINE`, or is
    `partial` with the frames so far."""
    limits: Limits
    """Checked before decoding; over them the request fails with `LIMIT_EXCEEDED`."""
    index_folder: Path | None
    """Where packet indexes are kept between calls, if the backend makes any; None keeps none."""


class Backend(Protocol):
    """What `torchcodec_backend.load` and `native.load` both are."""

    def __call__(
        self, requests: Sequence[Request], geometry: Geometry, dtype: torch.dtype, options: LoadOptions, /
    ) -> tuple[Tensor, list[VideoResult]]:
        """Decode every request on its own; never raise for what a file can cause.

        Args:
            requests: may repeat a file; each is answered by itself.
            dtype: float32 or bfloat16 (normalised) or uint8 (as resized), see `patches.normalise_rows`.

        Which frames: `sampling.sample_times` + `frames_on_screen` in mode `pts`, else `sampling.sample_indices`, over
        the frames in presentation order that the container shows (edit lists and discard flags applied). Their size:
        `geometry.frame_size(number of wanted frames, height, width)` after rotation, also when some turn out missing.
        Fewer than two wanted or good frames is `TOO_FEW_FRAMES`.

        Returns:
            [num_patches, row_width] rows of all results that are not `failed`, in order, and one result per request;
            `second_per_grid` is temporal_patch_size * (sampled part in seconds) / (number of wanted frames).
        """

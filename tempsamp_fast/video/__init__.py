"""Video files to model-ready patches: `load_videos` takes (path, sampling) pairs and returns packed patches.

geometry = geometry_of(model.config)  # of tempsamp_fast.model.families; or Geometry.of_family("qwen3_vl")
batch = load_videos([("clip.mp4", Sampling(fps=2.0))], geometry)
model(pixel_values_videos=batch.pixel_values, video_grid_thw=batch.video_grid_thw, ...)
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from tempsamp_fast.video.backend import Backend, LoadOptions, why_no_extension
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.patches import PATCH_DTYPES, normalise_rows
from tempsamp_fast.video.result import Limits, VideoBatch, VideoError, VideoResult
from tempsamp_fast.video.sampling import Sampling
from tempsamp_fast.video.target import Target, find_target

__all__ = [
    "BackendName",
    "Geometry",
    "Limits",
    "Sampling",
    "VideoBatch",
    "VideoError",
    "VideoResult",
    "frames",
    "load_videos",
    "normalise_rows",
]

log = logging.getLogger(__name__)

BackendName = Literal["auto", "native", "torchcodec"]
OnError = Literal["raise", "skip", "partial"]
NO_LIMITS = Limits()


def load_videos(
    requests: Sequence[tuple[str | os.PathLike[str], Sampling]],
    geometry: Geometry,
    *,
    backend: BackendName = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_error: OnError = "raise",
    num_threads: int | None = None,
    deadline_s: float = 60.0,
    limits: Limits = NO_LIMITS,
    index_folder: str | os.PathLike[str] | None = None,
) -> VideoBatch:
    """Decode, sample, resize, normalise and cut into patches; bits as the Hugging Face processors on the CPU.

    Args:
        requests: (path, sampling) pairs; a file may occur more than once.
        geometry: frame sizes and patch layout of the model.
        backend: `auto` is `native` where the extension is built and loads, else `torchcodec`.
        device: where the patches are wanted: `cpu`, `cuda` (the current one), `cuda:<number>`, or `auto`: `cuda` where
            there is one, else `cpu`. For a CUDA device `native` decodes with the GPU's hardware decoders, ordered by
            the current stream; what they cannot decode the CPU does, and the result's `backend` says why.
        dtype: float32 or bfloat16 (normalised), or uint8: as resized, for `normalise_rows` to finish on any device.
        on_error: `raise` the first failure; `skip` videos that are not whole (their result says why); `partial`: as
            `skip`, but keep the good frames of a damaged video.
        num_threads: files decoded at the same time; None is the number of usable cores, and of hardware decoders.
        deadline_s: seconds for each video; `inf` for none.
        limits: what one file may cost.
        index_folder: existing folder where `native` keeps the packet index of every file it has read, so that the next
            run does not read the file through again; None keeps none. `torchcodec` makes no index.

    Raises:
        VideoError: a file failed and `on_error` is `raise`; it names the file and has a `code`.
        ValueError: an argument is not one of its choices, or `device` or the backend is not there.
        RuntimeError: hardware decoders are used in a process forked from the one that opened them.
    """
    if on_error not in get_args(OnError):
        raise ValueError(f"on_error must be one of {get_args(OnError)}, got {on_error!r}")
    if dtype not in PATCH_DTYPES:
        raise ValueError(f"dtype must be one of {PATCH_DTYPES}, got {dtype}")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    if math.isnan(deadline_s) or deadline_s <= 0:
        raise ValueError(f"deadline_s must be positive, got {deadline_s}")
    load = load_on(find_target(device), backend)
    folder = None if index_folder is None else Path(index_folder)
    options = LoadOptions(on_error == "partial", num_threads, deadline_s, limits, folder)
    rows, results = load([(Path(path).absolute(), sampling) for path, sampling in requests], geometry, dtype, options)
    for result in results:
        if result.status == "failed" and on_error == "raise":
            raise result.error()
        if result.status != "ok":
            log.warning("%s", result.message)
    return VideoBatch.pack(rows, results, geometry.temporal_patch_size)


def load_on(target: Target, backend: BackendName) -> Backend:
    """A backend whose patches come on the device of `target`: its hardware decoders, or the CPU and a copy."""
    on_cpu, reason = load_function(backend), target.reason
    if target.decoders is not None:
        from tempsamp_fast.video import native, nvdec

        if on_cpu is native.load:
            return partial(nvdec.load, device=target.device, decoders=target.decoders)
        reason = f"backend is {backend!r}"
    if not reason:
        return on_cpu

    def load(*arguments: Any) -> tuple[torch.Tensor, list[VideoResult]]:
        rows, results = on_cpu(*arguments)
        return rows.to(target.device), [result.decoded_instead_of("nvdec", reason) for result in results]

    return load


@cache
def load_function(backend: BackendName) -> Backend:
    """The backend behind a name; `auto` logs once what it took and why.

    Raises ValueError for an unknown name, and for `native` where the extension is not there.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    trouble = why_no_extension()
    if backend == "native" and trouble:
        raise ValueError(f"backend='native': {trouble}; the choices are 'auto' and 'torchcodec'")
    if backend == "auto":
        backend = "torchcodec" if trouble else "native"
        log.info("video backend: %s (%s)", backend, trouble or "the extension is built")
    module = "native" if backend == "native" else "torchcodec_backend"
    return importlib.import_module(f"tempsamp_fast.video.{module}").load


def frames(path: str | os.PathLike[str], times_s: Sequence[float], height: int) -> torch.Tensor:
    """RGB thumbnails of the frames on screen at `times_s` (seconds since the first frame, clamped to the video).

    Returns [n, 3, height, width] uint8, the width following the aspect of the video. Taken by `native` where the
    extension is built and loads, else by torchcodec. Raises VideoError, also for a frame that is damaged or missing.
    """
    from tempsamp_fast.video import thumbnails

    return thumbnails.frames(Path(path).absolute(), times_s, height)

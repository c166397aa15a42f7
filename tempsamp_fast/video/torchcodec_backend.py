"""Decoding with torchcodec: the fallback where the extension is not built, and the oracle in tests.

torchcodec does not verify which frame a seek landed on, and does not tell pictures that a decoder makes up from good
ones. So times are compared with those that were asked for, and FFmpeg's log is listened to; where either gives a
doubt, the file is decoded again from its beginning without seeking, up to the first complaint. Files where torchcodec
misses the very first frame, or whose clock starts again, are refused.

Known limits: torchcodec cannot be interrupted (past the deadline its thread is left to finish the frames at hand);
nothing is good after the first damage; damage that FFmpeg does not notice (as in VP8 and VP9, which have no checksums)
passes. What that means file by file is in bench/results/video_corpus.json.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast.video.backend import LoadOptions, Request, usable_cores
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.loaded_ffmpeg import MOST_PROBED, listening, probed_format
from tempsamp_fast.video.patches import normalise_rows, patchify
from tempsamp_fast.video.result import SINGLE_FRAME, Code, Limits, VideoError, VideoResult, failure
from tempsamp_fast.video.sampling import FRAME_FACTOR, TOLERANCE_S, Sampling, sample_indices, sample_times

try:
    from torchcodec.decoders import VideoDecoder, VideoStreamMetadata
except (ImportError, OSError, RuntimeError) as error:  # its libraries are built for some releases of torch each
    raise ImportError(
        f"torchcodec does not load beside torch {torch.__version__}: install the release that fits, such as 0.13 for "
        f"torch 2.11 to 2.13 and 0.17 for 2.14 ({str(error)[:200]})"
    ) from error

from tempsamp_fast.video.verified_frames import (
    AT_THE_END,
    DEADLINE,
    Found,
    Wanted,
    by_seeking,
    first_line,
    in_order,
    shown_span,
)

NAME = "torchcodec"
HAND_OVER_S = 0.5
"""Time after the deadline in which the frames so far may still be handed over."""
FORMATS = {
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "ivf", "obu", "av1", "flv"),
    *("ogg", "asf", "mxf", "nut", "gif", "rm", "wtv", "dv", "yuv4mpegpipe", "h263", "vvc", "vc1", "mjpeg", "apng"),
    "webp_anim",
}
"""As the extension's: others (playlists, manifests, session descriptions) make FFmpeg open files or the network."""


def load(
    requests: Sequence[Request], geometry: Geometry, dtype: torch.dtype, options: LoadOptions
) -> tuple[Tensor, list[VideoResult]]:
    """See `backend.Backend`; `num_threads` files are decoded at the same time, each by one thread."""

    no_rows = torch.empty(0, geometry.row_width, dtype=dtype)

    def answer(request: Request) -> tuple[Tensor, VideoResult]:
        path, sampling = request
        deadline = time.monotonic() + options.deadline_s
        try:
            return _until(deadline, path, lambda: _load_one(path, sampling, geometry, dtype, options, deadline))
        except VideoError as error:
            return no_rows, failure(error, NAME)

    with ThreadPoolExecutor(options.num_threads or usable_cores()) as pool:
        answers = list(pool.map(answer, requests))
    results = [result for _, result in answers]
    if len(answers) == 1:
        return answers[0][0], results
    return torch.cat([no_rows, *(rows for rows, _ in answers)]), results


def _until(deadline: float, path: Path, work: Callable[[], tuple[Tensor, VideoResult]]) -> tuple[Tensor, VideoResult]:
    """What `work` gives on a thread of its own, or raises; VideoError when it has not come soon after `deadline`."""
    outcome: queue.SimpleQueue[tuple[Tensor, VideoResult] | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(work())
        except Exception as error:  # raised again on the thread that waits
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    left_s = max(deadline - time.monotonic(), 0.0) + HAND_OVER_S
    try:
        answer = outcome.get(timeout=min(left_s, threading.TIMEOUT_MAX))
    except queue.Empty:
        raise VideoError(path, "DEADLINE", DEADLINE) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def open_decoder(path: Path) -> VideoDecoder:
    """The best video stream of a regular file, indexed exactly. Raises VideoError."""
    if not path.exists():
        raise VideoError(path, "NOT_FOUND", "no such file")
    if not path.is_file():
        raise VideoError(path, "OPEN_FAILED", "not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(MOST_PROBED)
    except OSError as error:
        raise VideoError(path, "OPEN_FAILED", f"cannot be read ({error.strerror})") from error
    if not head:
        raise VideoError(path, "OPEN_FAILED", "the file is empty")
    found = probed_format(path, head)
    if found.split(",")[0] not in FORMATS:
        raise VideoError(path, "OPEN_FAILED", f"{found or 'nothing that FFmpeg knows'}, not a video file")
    try:
        return VideoDecoder(str(path.absolute()), device="cpu")
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = first_line(error)
        code: Code = "NO_VIDEO_STREAM" if "video stream" in reason else "OPEN_FAILED"
        raise VideoError(path, code, f"cannot be opened as a video ({reason})") from error


def _load_one(
    path: Path,
    sampling: Sampling,
    geometry: Geometry,
    dtype: torch.dtype,
    options: LoadOptions,
    deadline: float,
) -> tuple[Tensor, VideoResult]:
    with listening() as complaints:
        decoder = open_decoder(path)
    wanted = _wanted(path, decoder, sampling)
    num_wanted = len(wanted.positions)
    frame_size = _frame_size(path, decoder.metadata, num_wanted, geometry, dtype, options.limits)
    check_first_frame(path, decoder)
    found = None if complaints or not wanted.may_seek() else by_seeking(wanted, frame_size, deadline)
    if found is None:
        found = in_order(path, replace(wanted, decoder=open_decoder(path)), frame_size, deadline, complaints)
    num_good = len(found.frames)
    code, reason = _verdict(decoder.metadata, found, num_wanted)
    failed = VideoError(path, code, f"{num_good} of {num_wanted} wanted frames decoded ({reason})")
    if code != "OK" and (not options.keep_partial or num_good < FRAME_FACTOR):
        raise failed
    begin, _ = shown_span(decoder.metadata)
    frames = torch.stack(found.frames)
    return normalise_rows(patchify(frames, geometry), geometry, dtype), VideoResult(
        path=path,
        status="ok" if code == "OK" else "partial",
        code=code,
        message="" if code == "OK" else str(failed),
        num_frames=num_good,
        frame_times_s=torch.tensor(found.times_s, dtype=torch.float64) - begin,
        grid_thw=geometry.grid_thw(num_good, frame_size),
        second_per_grid=geometry.temporal_patch_size * wanted.second_per_frame,
        begin_s=begin,
        backend=NAME,
        note=SINGLE_FRAME if decoder.metadata.num_frames == 1 else "",
    )


def _wanted(path: Path, decoder: VideoDecoder, sampling: Sampling) -> Wanted:
    metadata = decoder.metadata
    num_frames = metadata.num_frames or 0
    fps = metadata.average_fps_from_header or metadata.average_fps or 0.0
    begin, end = shown_span(metadata)
    if num_frames == 1 and sampling.start_s == 0:
        return Wanted(decoder, np.zeros(FRAME_FACTOR, dtype=np.int64), 1 / sampling.fps, by_time=False)
    if num_frames < FRAME_FACTOR or not (math.isfinite(fps) and fps > 0):
        raise VideoError(path, "TOO_FEW_FRAMES", f"has {num_frames} frames, at least {FRAME_FACTOR} are needed")
    if sampling.mode == "pts":
        times, second_per_frame = sample_times(sampling, num_frames, end - begin)
        positions = np.minimum(begin + times + TOLERANCE_S, np.nextafter(end, begin))
    else:
        positions, second_per_frame = sample_indices(sampling, num_frames, fps)
    if len(positions) < FRAME_FACTOR:
        raise VideoError(path, "TOO_FEW_FRAMES", f"gives {len(positions)} frames for {sampling}")
    return Wanted(decoder, positions, second_per_frame, by_time=sampling.mode == "pts")


def _frame_size(
    path: Path, metadata: VideoStreamMetadata, num_wanted: int, geometry: Geometry, dtype: torch.dtype, limits: Limits
) -> tuple[int, int]:
    """(height, width) after resizing. Raises VideoError over the limits or where the model takes no such frame."""
    height, width = metadata.height or 0, metadata.width or 0
    try:
        frame_size = geometry.frame_size(num_wanted, height, width)
    except ValueError as error:
        raise VideoError(path, "BAD_GEOMETRY", str(error)) from error
    num_patches = math.prod(geometry.grid_thw(num_wanted, frame_size))
    limits.check(path, height * width, metadata.num_frames or 0, num_patches * geometry.row_width * dtype.itemsize)
    return frame_size


def check_first_frame(path: Path, decoder: VideoDecoder) -> None:
    """Refuse files whose first frame torchcodec cannot find (MPEG-TS, AVI with B-frames, cuts inside a GOP)."""
    begin, _ = shown_span(decoder.metadata)
    try:
        first_s = decoder.get_frame_at(0).pts_seconds
    except RuntimeError:
        return  # reported with the frames that were asked for
    if abs(first_s - begin) > TOLERANCE_S:
        reason = f"the first frame should be at {begin:.3f} s, torchcodec finds {first_s:.3f} s; build the extension"
        raise VideoError(path, "UNSUPPORTED", reason)


def _verdict(metadata: VideoStreamMetadata, found: Found, num_wanted: int) -> tuple[Code, str]:
    """The code of a video of which this was found, and the reason for it."""
    if len(found.frames) == num_wanted:
        begin, end = shown_span(metadata)
        promised_s, promised = metadata.duration_seconds_from_header or 0.0, metadata.num_frames_from_header or 0
        if promised > (metadata.num_frames or 0) and promised_s > 1.05 * (end - begin) + 0.1:
            return "TRUNCATED", f"the file ends after {end - begin:.2f} of {promised_s:.2f} s"
        return "OK", ""
    if found.missing == DEADLINE:
        return "DEADLINE", DEADLINE
    if not found.frames:
        return "DECODE_FAILED", found.missing
    return ("TRUNCATED" if AT_THE_END in found.missing else "DAMAGED"), found.missing

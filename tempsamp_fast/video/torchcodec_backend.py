"""Decoding with torchcodec: the fallback where the extension is not built, and the oracle in tests.

Known limits: torchcodec cannot be interrupted (past the deadline its thread is left to finish the frames at hand), does
not verify which frame a seek landed on (files where it misses the very first one are refused) and does not tell
concealed frames from good ones. What that means file by file is in bench/results/video_corpus.json.
"""

from __future__ import annotations

import ctypes
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast.video.backend import Request, usable_cores
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.patches import normalise_rows, patchify, resize_frames
from tempsamp_fast.video.result import SINGLE_FRAME, Code, Limits, VideoError, VideoResult, failure
from tempsamp_fast.video.sampling import FRAME_FACTOR, TOLERANCE_S, Sampling, sample_indices, sample_times

try:
    from torchcodec.decoders import VideoDecoder, VideoStreamMetadata
except (ImportError, OSError, RuntimeError) as error:  # its libraries are built for some releases of torch each
    raise ImportError(
        f"torchcodec does not load beside torch {torch.__version__}: install the release that fits, such as 0.13 for "
        f"torch 2.11 to 2.13 and 0.17 for 2.14 ({str(error)[:200]})"
    ) from error

NAME = "torchcodec"
CHUNK = 16
"""Frames decoded at a time: bounds the memory for frames at native size."""
DEADLINE = "the deadline passed"
HAND_OVER_S = 0.5
"""Time after the deadline in which the frames so far may still be handed over."""
FORMATS = {
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "ivf", "obu", "av1", "flv"),
    *("ogg", "asf", "mxf", "nut", "gif", "rm", "wtv", "dv", "yuv4mpegpipe", "h263", "vvc", "vc1", "mjpeg", "apng"),
    "webp_anim",
}
"""As the extension's: others (playlists, manifests, session descriptions) make FFmpeg open files or the network."""
MOST_PROBED, WEAK_SCORE = 1 << 20, 25
"""Bytes after which FFmpeg takes any guess at the format, and the score that it doubts before."""


def load(
    requests: Sequence[Request],
    geometry: Geometry,
    dtype: torch.dtype,
    *,
    keep_partial: bool,
    num_threads: int | None,
    deadline_s: float,
    limits: Limits,
    index_folder: Path | None,
) -> tuple[Tensor, list[VideoResult]]:
    """See `backend.Backend`; `num_threads` files are decoded at the same time, each by one thread."""

    no_rows = torch.empty(0, geometry.row_width, dtype=dtype)

    def answer(request: Request) -> tuple[Tensor, VideoResult]:
        path, sampling = request
        deadline = time.monotonic() + deadline_s
        try:
            return _until(
                deadline, path, lambda: _load_one(path, sampling, geometry, dtype, keep_partial, deadline, limits)
            )
        except VideoError as error:
            return no_rows, failure(error, NAME)

    with ThreadPoolExecutor(num_threads or usable_cores()) as pool:
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


@dataclass(frozen=True)
class Wanted:
    """The frames to fetch from one open file: by time or by index."""

    decoder: VideoDecoder
    positions: np.ndarray
    """[n] float64 seconds in the container's clock, or int64 frame indices."""
    second_per_frame: float
    by_time: bool

    def fetch(self, chunk: range) -> tuple[Tensor, Tensor]:
        """Frames [T, 3, H, W] uint8 and their times [T] float64; RuntimeError when one does not decode."""
        positions = torch.from_numpy(self.positions[chunk.start : chunk.stop])
        if not self.by_time:
            batch = self.decoder.get_frames_at(positions)
            return batch.data, batch.pts_seconds
        batch = self.decoder.get_frames_played_at(positions)
        return batch.data, batch.pts_seconds


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
        reason = _first_line(error)
        code: Code = "NO_VIDEO_STREAM" if "video stream" in reason else "OPEN_FAILED"
        raise VideoError(path, code, f"cannot be opened as a video ({reason})") from error


class _ProbeData(ctypes.Structure):
    """FFmpeg's AVProbeData."""

    _fields_ = (
        ("filename", ctypes.c_char_p),
        ("buf", ctypes.c_char_p),
        ("buf_size", ctypes.c_int),
        ("mime_type", ctypes.c_char_p),
    )


@cache
def _libavformat() -> ctypes.CDLL:
    """The one that torchcodec has loaded."""
    library = ctypes.CDLL(re.findall(r"/\S*libavformat\S*", Path("/proc/self/maps").read_text())[0])
    library.av_probe_input_format3.restype = ctypes.POINTER(ctypes.c_char_p)  # AVInputFormat begins with its name
    return library


def probed_format(path: Path, head: bytes) -> str:
    """The format that FFmpeg will take a file for that begins with `head`, by its own probe; empty for none.

    As avformat_open_input: first by the name alone (image sequences), then by more and more of the file.
    """
    sizes = [0, *(1 << bits for bits in range(11, MOST_PROBED.bit_length()))]
    for size in sizes:
        part, score = head[:size], ctypes.c_int()
        data = _ProbeData(bytes(path.absolute()), part + bytes(64), len(part), None)
        found = _libavformat().av_probe_input_format3(ctypes.byref(data), int(size > 0), ctypes.byref(score))
        if found and score.value > (WEAK_SCORE if 0 < size < len(head) else 0):
            return found[0].decode()
    return ""


def shown_span(metadata: VideoStreamMetadata) -> tuple[float, float]:
    """(begin, end) of what the file shows, seconds in the container's clock."""
    return metadata.begin_stream_seconds or 0.0, metadata.end_stream_seconds or 0.0


def _load_one(
    path: Path,
    sampling: Sampling,
    geometry: Geometry,
    dtype: torch.dtype,
    keep_partial: bool,
    deadline: float,
    limits: Limits,
) -> tuple[Tensor, VideoResult]:
    decoder = open_decoder(path)
    wanted = _wanted(path, decoder, sampling)
    num_wanted = len(wanted.positions)
    frame_size = _frame_size(path, decoder.metadata, num_wanted, geometry, dtype, limits)
    check_first_frame(path, decoder)

    chunks, times = [], []
    errors: dict[int, str] = {}
    for start in range(0, num_wanted, CHUNK):
        for frames, pts in _fetch(wanted, range(start, min(start + CHUNK, num_wanted)), deadline, errors):
            chunks.append(resize_frames(frames, frame_size))
            times.append(pts)
    num_good = num_wanted - len(errors)
    code, reason = _verdict(decoder.metadata, errors, num_wanted)
    failed = VideoError(path, code, f"{num_good} of {num_wanted} wanted frames decoded ({reason})")
    if code != "OK" and (not keep_partial or num_good < FRAME_FACTOR):
        raise failed
    begin, _ = shown_span(decoder.metadata)
    frames = torch.cat(chunks)
    return normalise_rows(patchify(frames, geometry), geometry, dtype), VideoResult(
        path=path,
        status="ok" if code == "OK" else "partial",
        code=code,
        message="" if code == "OK" else str(failed),
        num_frames=num_good,
        frame_times_s=torch.cat(times) - begin,
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


def _fetch(wanted: Wanted, chunk: range, deadline: float, errors: dict[int, str]) -> Iterator[tuple[Tensor, Tensor]]:
    """The frames of `chunk`, together or, where one does not decode, one by one; what failed goes into `errors`."""
    if time.monotonic() > deadline:
        errors.update(dict.fromkeys(chunk, DEADLINE))
        return
    try:
        yield wanted.fetch(chunk)
    except RuntimeError as error:
        if len(chunk) == 1:
            errors[chunk[0]] = _first_line(error)
            return
        for position in chunk:
            yield from _fetch(wanted, range(position, position + 1), deadline, errors)


def _verdict(metadata: VideoStreamMetadata, errors: dict[int, str], num_wanted: int) -> tuple[Code, str]:
    """The code of a video of which `errors` did not decode, and the reason for it."""
    if not errors:
        begin, end = shown_span(metadata)
        promised_s, promised = metadata.duration_seconds_from_header or 0.0, metadata.num_frames_from_header or 0
        if promised > (metadata.num_frames or 0) and promised_s > 1.05 * (end - begin) + 0.1:
            return "TRUNCATED", f"the file ends after {end - begin:.2f} of {promised_s:.2f} s"
        return "OK", ""
    reason = next(iter(errors.values()))
    if DEADLINE in errors.values():
        return "DEADLINE", DEADLINE
    if len(errors) == num_wanted:
        return "DECODE_FAILED", reason
    return ("TRUNCATED" if min(errors) == num_wanted - len(errors) else "DAMAGED"), reason


def _first_line(error: Exception) -> str:
    """The message without the source location that torchcodec puts before it."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.split(".cpp:")[-1].split(", ", 1)[-1]

"""Frames from torchcodec, with a check that they are those that were asked for, and whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchcodec import Frame
from torchcodec.decoders import VideoDecoder, VideoStreamMetadata

from tempsamp_fast.video.loaded_ffmpeg import listening
from tempsamp_fast.video.patches import resize_frames
from tempsamp_fast.video.result import VideoError

CHUNK = 16
"""Frames decoded at a time: bounds the memory for frames at native size."""
DEADLINE = "the deadline passed"
AT_THE_END = "no more frames"
"""What torchcodec says where it has no frame for a place of its index."""
DOUBTFUL = 3
"""Frames before a complaint of FFmpeg that may be what it complains of: a demuxer sees a hole when it reads on."""
SURE_OF_KEYS = {"h264", "hevc", "vvc", "vp8", "vp9", "av1"}
"""Codecs whose decoders complain where a container takes another picture for a key."""


def shown_span(metadata: VideoStreamMetadata) -> tuple[float, float]:
    """(begin, end) of what the file shows, seconds in the container's clock."""
    return metadata.begin_stream_seconds or 0.0, metadata.end_stream_seconds or 0.0


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

    def may_seek(self) -> bool:
        """Whether a seek can be told to have gone right."""
        return self.decoder.metadata.codec in SURE_OF_KEYS and not self.is_crowded()

    def is_crowded(self) -> bool:
        """Whether there are more frames than the file's time has room for: clips may lie over one another there."""
        metadata = self.decoder.metadata
        begin, end = shown_span(metadata)
        room = (metadata.average_fps_from_header or math.inf) * (end - begin)
        return (metadata.num_frames or 0) >= room + 0.5

    def has_times(self, chunk: range, pts_s: Tensor) -> bool:
        """Whether these are the times of the frames asked for: never a later one, by index as an even rate has them."""
        positions, pts = self.positions[chunk.start : chunk.stop], pts_s.numpy()
        if self.by_time:
            return bool((pts <= positions).all())
        begin, end = shown_span(self.decoder.metadata)
        step = (end - begin) / (self.decoder.metadata.num_frames or 1)
        return bool((np.abs(pts - begin - positions * step) < step / 2).all())


@dataclass
class Found:
    """The frames of the first places, resized [3, height, width] uint8."""

    frames: list[Tensor] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    missing: str = ""
    """Why there is none for the places that follow."""


def by_seeking(wanted: Wanted, frame_size: tuple[int, int], deadline: float) -> Found | None:
    """The frames, `CHUNK` at a time; None where anything gives a doubt."""
    found = Found()
    for start in range(0, len(wanted.positions), CHUNK):
        chunk = range(start, min(start + CHUNK, len(wanted.positions)))
        if time.monotonic() > deadline:
            found.missing = DEADLINE
            break
        try:
            with listening() as complaints:
                frames, pts_s = wanted.fetch(chunk)
        except RuntimeError:
            return None
        if complaints or not wanted.has_times(chunk, pts_s):
            return None
        found.frames += resize_frames(frames, frame_size)
        found.times_s += pts_s.tolist()
    return found


def in_order(path: Path, wanted: Wanted, frame_size: tuple[int, int], deadline: float, heard: Sequence[str]) -> Found:
    """All frames of a new decoder from the first on, up to where it stops or FFmpeg complains.

    `heard`: complaints when the file was read through before; where none comes again, it is of what is behind the end.
    Raises VideoError where clips lie over one another in time.
    """
    found, seen = Found(), list[Frame]()
    is_crowded = wanted.is_crowded()

    def show_until(limit: float) -> None:
        while seen and len(found.frames) < len(wanted.positions) and wanted.positions[len(found.frames)] < limit:
            found.frames.append(resize_frames(seen[-1].data[None], frame_size)[0])
            found.times_s.append(seen[-1].pts_seconds)

    def only_sure(complaints: Sequence[str]) -> Found:
        sure_s = seen[-1 - DOUBTFUL].pts_seconds if len(seen) > DOUBTFUL else -math.inf
        num_sure = sum(time_s <= sure_s for time_s in found.times_s)
        del found.frames[num_sure:], found.times_s[num_sure:]
        found.missing = complaints[0]
        return found

    num_frames = wanted.decoder.metadata.num_frames or 0
    for number in range(num_frames):
        if time.monotonic() > deadline:
            found.missing = DEADLINE
            return found
        failure = ""
        with listening() as complaints:
            try:
                frame = wanted.decoder.get_frame_at(number)
            except (RuntimeError, IndexError) as error:
                failure = first_line(error)
        if complaints:
            return only_sure(complaints)
        if failure and is_crowded and AT_THE_END in failure and number + DOUBTFUL < num_frames:
            reason = "its clips lie over one another in time, and torchcodec reads the first; build the extension"
            raise VideoError(path, "UNSUPPORTED", reason)
        if failure:
            found.missing = failure
            known_until_s = seen[-1].pts_seconds + seen[-1].duration_seconds if seen else -math.inf
            show_until(known_until_s if wanted.by_time else number)
            return found
        if seen and frame.pts_seconds < seen[-1].pts_seconds:
            reason = f"its clock goes back at frame {number}, which torchcodec does not follow; build the extension"
            raise VideoError(path, "UNSUPPORTED", reason)
        show_until(frame.pts_seconds if wanted.by_time else number)
        seen = [*seen[-DOUBTFUL:], frame]
        if len(found.frames) == len(wanted.positions) and not is_crowded:
            return found
    show_until(math.inf)
    return only_sure(heard) if heard else found


def first_line(error: Exception) -> str:
    """The message without the source location that torchcodec puts before it."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.split(".cpp:")[-1].split(", ", 1)[-1]

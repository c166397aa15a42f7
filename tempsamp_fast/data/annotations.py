"""Published annotation files, each read into samples; an error names the place and the value."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.data.formats import FORMATS, detect_format
from tempsamp_fast.data.prompts import SHORTEST_S, normalise_query
from tempsamp_fast.data.record import FROM_FILE, UNTOLD, Record
from tempsamp_fast.data.text_files import as_number, shown, typed
from tempsamp_fast.data.video_folder import NoDuration, VideoFolder
from tempsamp_fast.sample import Sample, Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds."""

    samples: list[Sample]
    """In file order."""
    dropped: list[str]
    """Why a query is not among them, a line for each that names the file and the place."""
    untimed: dict[Path, str] = field(default_factory=dict)
    """Videos whose length neither the file nor they themselves tell, and why; it is taken from their last window."""

    @property
    def num_late_ends(self) -> int:
        """Windows that end beyond the video."""
        return sum(end > sample.duration_s for sample in self.samples for _, end in sample.windows)


def load_annotations(
    path: str | Path, videos: str | Path | None = None, format: str = "auto", skips_bad: bool = False
) -> list[Sample]:
    """The samples of `read_annotations`; how many queries were dropped and how many windows end late is logged once.

    skips_bad: a video whose length nothing tells is no error, but a sample whose video cannot be read later on.
    Raises as `read_annotations` does, and ValueError for videos whose length nothing tells.
    """
    annotations = read_annotations(path, videos, format)
    if annotations.untimed:
        first, *others = annotations.untimed.values()
        told = first + (f"; and so for {len(others)} more videos (data check lists them)" if others else "")
        if not skips_bad:
            raise ValueError(told)
        logger.warning("%s", told)
    if annotations.dropped:
        num_queries = len(annotations.samples) + len(annotations.dropped)
        dropped, first = len(annotations.dropped), annotations.dropped[0]
        logger.warning("%s: dropped %d of %d queries, the first: %s", path, dropped, num_queries, first)
    if late := annotations.num_late_ends:
        num_windows = sum(len(sample.windows) for sample in annotations.samples)
        logger.warning("%s: %d of %d windows end beyond their video; kept as they are", path, late, num_windows)
    return annotations.samples


def read_annotations(path: str | Path, videos: str | Path | None = None, format: str = "auto") -> Annotations:
    """The samples of the annotation file `path`, and what of it had to be dropped.

    `format` is a name of `FORMATS` or `auto`, which tells them apart by their suffix and keys. `Sample.video` is the
    file that a `VideoFolder` finds in the folder `videos`, or `<videos>/<id>.mp4` where it finds none: reading
    annotations needs no videos. A window that ends beyond the video is kept as it is, as the evaluations of the paper's
    lineage do.

    Dropped, as published loaders do, are queries that are empty, have no window or a video of no length, and those with
    a window that starts before 0 or not before the video's end, or does not end after its start.

    Raises FileNotFoundError for a missing file, and ValueError naming the file, the video, the field and the value for
    malformed JSON, a missing field, a wrong type, a number that is not finite, half a surrogate pair, an id or a JSON
    key that comes twice, or a path that leaves `videos`; also where nothing is left. What it quotes is cut to a line.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format {format!r}: {choose_from(format, ['auto', *FORMATS])}")
    reader = FORMATS[detect_format(path) if format == "auto" else format]
    folder = VideoFolder(videos)
    ids: set[str] = set()
    samples, dropped = [], []
    untimed: dict[Path, str] = {}
    for record in reader(path):
        if record.sample_id in ids:
            raise ValueError(f"{record.place}: a sample of id {shown(record.sample_id)} came before")
        ids.add(record.sample_id)
        record, why_untimed = _timed(record, folder)
        try:
            samples.append(_sample(record, folder))
        except _UnusableQuery as reason:
            dropped.append(str(reason))
            continue
        if why_untimed:
            untimed.setdefault(samples[-1].video, why_untimed)
    if not samples:
        flaws = f"; dropped {len(dropped)}, the first: {dropped[0]}" if dropped else ""
        raise ValueError(f"{path}: no annotated query in it{flaws}")
    return Annotations(samples, dropped, untimed)


def find_video(folder: str | Path, video_id: str) -> Path | None:
    """As `VideoFolder.find`, for one video."""
    return VideoFolder(folder).find(video_id)


class _UnusableQuery(ValueError):
    """Well-formed, but nothing to learn from or to be tested on."""


def _timed(record: Record, folder: VideoFolder) -> tuple[Record, str]:
    """With a duration, the last end where none is told; and why nothing tells it where the video should."""
    if record.duration is FROM_FILE:
        try:
            return dataclasses.replace(record, duration=folder.duration_s(record.place, record.video_id)), ""
        except NoDuration as error:
            return dataclasses.replace(record, duration=_last_end(record)), str(error)
    return (dataclasses.replace(record, duration=_last_end(record)) if record.duration is UNTOLD else record), ""


def _sample(record: Record, folder: VideoFolder) -> Sample:
    place = record.place
    duration_s = as_number(place, "duration", record.duration)
    if duration_s <= 0:
        raise _UnusableQuery(f"{place}: duration {duration_s} is not positive")
    if duration_s < SHORTEST_S:
        raise _UnusableQuery(f"{place}: duration {duration_s} is below {SHORTEST_S} s")
    query = typed(place, "query", record.query, str)
    for name, text in (("query", query), ("id", record.sample_id), ("video", record.video_id)):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{place}: {name} {shown(text)} has half a surrogate pair, which is no text")
    if not normalise_query(query):
        raise _UnusableQuery(f"{place}: query {shown(query)} is empty")
    windows = typed(place, "windows", record.windows, list)
    if not windows:
        raise _UnusableQuery(f"{place}: no true window")
    try:
        video = folder.path(record.video_id)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Sample(
        sample_id=record.sample_id,
        video=video,
        query=query.strip(),
        duration_s=duration_s,
        windows=tuple(_window(place, window, duration_s) for window in windows),
        clip_scores=record.clip_scores,
        difficulty=None if record.difficulty is None else as_number(place, "difficulty", record.difficulty),
        offline_ious=record.offline_ious,
        reasoning=record.reasoning,
    )


def _last_end(record: Record) -> float:
    """In place of a duration that is not told."""
    windows = typed(record.place, "windows", record.windows, list)
    return max((_pair(record.place, window)[1] for window in windows), default=1.0)


def _pair(place: str, window: Any) -> Span:
    """Start and end, in any order."""
    if len(typed(place, "window", window, (list, tuple))) != 2:
        raise ValueError(f"{place}: window {shown(window)} is not a pair of start and end")
    start, end = (as_number(place, f"window {shown(window)}", time) for time in window)
    return start, end


def _window(place: str, window: Any, duration_s: float) -> Span:
    name = f"window {shown(window)}"
    start, end = _pair(place, window)
    if start < 0:
        raise _UnusableQuery(f"{place}: {name} starts before 0")
    if end <= start:
        raise _UnusableQuery(f"{place}: {name} does not end after its start")
    if start >= duration_s:
        raise _UnusableQuery(f"{place}: {name} starts at or beyond the duration {duration_s}")
    return start, end

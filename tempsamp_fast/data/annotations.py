"""Published annotation files, each read into samples; an error names the place and the value."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from tempsamp_fast.data.prompts import normalise_query
from tempsamp_fast.rewards import CLIP_S, parse_spans
from tempsamp_fast.sample import Sample, Span
from tempsamp_fast.system.files import parse_json

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi")
LARGEST = 1e300
"""A number that is not below it is taken for none: as an int it may be larger than any float."""


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds."""

    samples: list[Sample]
    """In file order."""
    dropped: list[str]
    """Why a query is not among them, a line for each that names the file and the place."""


def load_annotations(path: str | Path, videos: str | Path | None = None, format: str = "auto") -> list[Sample]:
    """The samples of `read_annotations`; how many queries were dropped and how many windows end late is logged once.

    Raises as `read_annotations` does.
    """
    annotations = read_annotations(path, videos, format)
    if annotations.dropped:
        num_queries = len(annotations.samples) + len(annotations.dropped)
        dropped, first = len(annotations.dropped), annotations.dropped[0]
        logger.warning("%s: dropped %d of %d queries, the first: %s", path, dropped, num_queries, first)
    _log_late_ends(Path(path), annotations.samples)
    return annotations.samples


def read_annotations(path: str | Path, videos: str | Path | None = None, format: str = "auto") -> Annotations:
    """The samples of the annotation file `path`, and what of it had to be dropped.

    `format` is a name of `FORMATS` or `auto`, which tells them apart by their suffix and keys. `Sample.video` is the
    file `find_video` sees in the folder `videos`, or `<videos>/<id>.mp4` where it sees none: reading annotations needs
    no videos. A window that ends beyond the video is kept as it is, as the evaluations of the paper's lineage do.

    Dropped, as published loaders do, are queries that are empty, have no window or a video of no length, and those with
    a window that starts before 0 or not before the video's end, or does not end after its start.

    Raises FileNotFoundError for a missing file, and ValueError naming the file, the video, the field and the value for
    malformed JSON, a missing field, a wrong type, a number that is not finite, an id that comes twice, or a path that
    leaves `videos`; also where nothing is left.
    """
    path = Path(path)
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format {format!r}: choose from auto, {', '.join(FORMATS)}")
    reader = FORMATS[_detect_format(path) if format == "auto" else format]
    folder = Path(videos) if videos is not None else None
    ids: set[str] = set()
    samples, dropped = [], []
    for record in reader(path):
        if record.sample_id in ids:
            raise ValueError(f"{record.place}: a sample of id {record.sample_id!r} came before")
        ids.add(record.sample_id)
        try:
            samples.append(_sample(record, folder))
        except _UnusableQuery as reason:
            dropped.append(str(reason))
    if not samples:
        flaws = f"; dropped {len(dropped)}, the first: {dropped[0]}" if dropped else ""
        raise ValueError(f"{path}: no annotated query in it{flaws}")
    return Annotations(samples, dropped)


def find_video(folder: str | Path, video_id: str) -> Path | None:
    """`<folder>/<video_id>` with the first of `VIDEO_SUFFIXES` that exists, or as it is when it has a suffix of them.

    Raises ValueError for an id that would leave `folder`.
    """
    return next((file for name in _file_names(video_id) if (file := Path(folder, name)).is_file()), None)


def _file_names(video_id: str) -> list[str]:
    inside = PurePath(video_id)
    if not inside.name or inside.is_absolute() or ".." in inside.parts or not video_id.isprintable():
        raise ValueError(f"video {video_id!r} is not a path inside the video folder")
    return [video_id] if inside.suffix in VIDEO_SUFFIXES else [video_id + suffix for suffix in VIDEO_SUFFIXES]


@dataclass(frozen=True)
class _Record:
    """One query as its file has it, unchecked; `place` says where that is."""

    place: str
    sample_id: str
    video_id: str
    query: Any
    duration: Any
    windows: Any
    clip_scores: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    difficulty: Any = None


class _UnusableQuery(ValueError):
    """Well-formed, but nothing to learn from or to be tested on."""


def _sample(record: _Record, folder: Path | None) -> Sample:
    place = record.place
    duration_s = _number(place, "duration", record.duration)
    if duration_s <= 0:
        raise _UnusableQuery(f"{place}: duration {duration_s} is not positive")
    query = _typed(place, "query", record.query, str)
    if not normalise_query(query):
        raise _UnusableQuery(f"{place}: query {query!r} is empty")
    windows = _typed(place, "windows", record.windows, list)
    if not windows:
        raise _UnusableQuery(f"{place}: no true window")
    try:
        missing = Path(folder or "", _file_names(record.video_id)[0])
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Sample(
        sample_id=record.sample_id,
        video=(folder and find_video(folder, record.video_id)) or missing,
        query=query.strip(),
        duration_s=duration_s,
        windows=tuple(_window(place, window, duration_s) for window in windows),
        clip_scores=record.clip_scores,
        difficulty=None if record.difficulty is None else _number(place, "difficulty", record.difficulty),
    )


def _window(place: str, window: Any, duration_s: float) -> Span:
    if len(_typed(place, "window", window, (list, tuple))) != 2:
        raise ValueError(f"{place}: window {window!r} is not a pair of start and end")
    start, end = (_number(place, f"window {window!r}", time) for time in window)
    if start < 0:
        raise _UnusableQuery(f"{place}: window {window!r} starts before 0")
    if end <= start:
        raise _UnusableQuery(f"{place}: window {window!r} does not end after its start")
    if start >= duration_s:
        raise _UnusableQuery(f"{place}: window {window!r} starts at or beyond the duration {duration_s}")
    return start, end


def _number(place: str, name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < LARGEST:
        raise ValueError(f"{place}: {name} has {repr(value)[:80]}, expected a finite number")
    return float(value)


def _typed(place: str, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        raise ValueError(f"{place}: {name} is {value!r}, expected a {expected}")
    return value


def _get(place: str, fields: dict[str, Any], *names: str) -> Any:
    """The first of `names` that `fields` has."""
    for name in names:
        if name in fields:
            return fields[name]
    raise ValueError(f"{place}: no field {' or '.join(map(repr, names))}, only {', '.join(fields)}")


def _log_late_ends(path: Path, samples: Sequence[Sample]) -> None:
    num_windows = sum(len(sample.windows) for sample in samples)
    num_late = sum(end > sample.duration_s for sample in samples for _, end in sample.windows)
    if num_late:
        logger.warning("%s: %d of %d windows end beyond their video; kept as they are", path, num_late, num_windows)


def _read_by_video(path: Path, queries_key: str, windows_key: str) -> Iterator[_Record]:
    for video_id, fields in _json_object(path).items():
        place = f"{path}: video {video_id!r}"
        _typed(place, "entry", fields, dict)
        queries = _typed(place, queries_key, _get(place, fields, queries_key), list)
        windows = _typed(place, windows_key, _get(place, fields, windows_key), list)
        if len(queries) != len(windows):
            raise ValueError(f"{place}: {len(queries)} {queries_key} but {len(windows)} {windows_key}")
        duration = _get(place, fields, "duration", "video_duration")
        for index, (query, window) in enumerate(zip(queries, windows, strict=True)):
            yield _Record(f"{place}, query {index}", f"{video_id}/{index}", video_id, query, duration, [window])


def _read_charades_text(path: Path) -> Iterator[_Record]:
    durations = _charades_durations(path)
    for number, line in _lines(path):
        place = f"{path}: line {number}"
        times, separator, query = line.partition("##")
        if not separator or len(times.split()) != 3:
            raise ValueError(f"{place}: {line!r} is not `VIDEO start end##sentence`")
        video_id, *window = times.split()
        if video_id not in durations:
            raise ValueError(f"{place}: video {video_id!r} is not in the Charades_v1_*.csv beside the file")
        windows = [[_float(place, time) for time in window]]
        yield _Record(
            f"{place}, video {video_id!r}", f"{video_id}/{number}", video_id, query, durations[video_id], windows
        )


def _charades_durations(path: Path) -> dict[str, float]:
    """The text form has no durations; the Charades tables it was published with do (columns id and length)."""
    tables = sorted(path.parent.glob("Charades_v1_*.csv"))
    if not tables:
        raise ValueError(
            f"{path}: the durations are missing; put Charades_v1_train.csv or Charades_v1_test.csv beside it"
        )
    durations = {}
    for table in tables:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                durations[_get(str(table), row, "id")] = _float(str(table), _get(str(table), row, "length"))
    return durations


def _read_qvhighlights(path: Path) -> Iterator[_Record]:
    for number, row in _json_rows(path):
        place = f"{path}: line {number}"
        video_id = _typed(place, "vid", _get(place, row, "vid"), str)
        place = f"{place}, video {video_id!r}"
        duration = _get(place, row, "duration")
        yield _Record(
            place=place,
            sample_id=str(_get(place, row, "qid")),
            video_id=video_id,
            query=_get(place, row, "query"),
            duration=duration,
            windows=_get(place, row, "relevant_windows"),
            clip_scores=_clip_scores(place, row, _number(place, "duration", duration)),
        )


def _clip_scores(place: str, row: dict[str, Any], duration_s: float) -> dict[int, tuple[int, ...]]:
    clips = _typed(place, "relevant_clip_ids", _get(place, row, "relevant_clip_ids"), list)
    scores = _typed(place, "saliency_scores", _get(place, row, "saliency_scores"), list)
    if len(clips) != len(scores):
        raise ValueError(f"{place}: {len(clips)} relevant_clip_ids but {len(scores)} saliency_scores")
    for clip, annotators in zip(clips, scores, strict=True):
        if type(clip) is not int or not 0 <= clip * CLIP_S < duration_s:
            raise ValueError(f"{place}: relevant_clip_ids has {clip!r}, expected an index of a {CLIP_S}-second clip")
        if not annotators or any(score not in range(5) for score in _typed(place, "saliency", annotators, list)):
            raise ValueError(f"{place}: saliency_scores has {annotators!r}, expected a list of whole numbers 0 to 4")
    return {clip: tuple(annotators) for clip, annotators in zip(clips, scores, strict=True)}


def _read_timelens(path: Path) -> Iterator[_Record]:
    for number, row in _json_rows(path):
        place = f"{path}: line {number}"
        videos = _typed(place, "videos", _get(place, row, "videos"), list)
        if len(videos) != 1 or not isinstance(videos[0], str):
            raise ValueError(f"{place}: videos is {videos!r}, expected a list of one path")
        place = f"{place}, video {videos[0]!r}"
        answer = _typed(place, "answer", _get(place, row, "answer"), str)
        windows = [list(span) for span in parse_spans(answer)]
        query, duration = _get(place, row, "problem"), _get(place, row, "duration")
        yield _Record(
            place, f"{videos[0]}/{number}", videos[0], query, duration, windows, difficulty=row.get("difficulty")
        )


def _read_timelens_100k(path: Path) -> Iterator[_Record]:
    for number, row in _json_rows(path):
        place = f"{path}: line {number}"
        video = _typed(place, "video_path", _get(place, row, "video_path"), str)
        place = f"{place}, video {video!r}"
        for index, event in enumerate(_typed(place, "events", _get(place, row, "events"), list)):
            fields = _typed(place, "event", event, dict)
            query, windows = _get(place, fields, "query"), _get(place, fields, "span")
            yield _Record(
                f"{place}, query {index}",
                f"{video}/{number}/{index}",
                video,
                query,
                _get(place, row, "duration"),
                windows,
            )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line that is not blank, with its number from 1."""
    return ((number, line) for number, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip())


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        place = f"{path}: line {number}"
        yield number, _typed(place, "row", parse_json(place, line), dict)


def _json_object(path: Path) -> dict[str, Any]:
    return _typed(str(path), "content", parse_json(str(path), _read_text(path)), dict)


def _float(place: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{place}: {text!r} is not a number") from error


FORMATS: dict[str, Callable[[Path], Iterator[_Record]]] = {
    "captions": partial(_read_by_video, queries_key="sentences", windows_key="timestamps"),
    "charades_text": _read_charades_text,
    "qvhighlights": _read_qvhighlights,
    "timelens": _read_timelens,
    "timelens_100k": _read_timelens_100k,
    "timelens_bench": partial(_read_by_video, queries_key="queries", windows_key="spans"),
}
"""Readers by name. `captions` is the JSON of Charades-STA and of ActivityNet Captions; `timelens_100k` is TimeLens-100K
as published, `timelens` the rows of question and answer that TempSamp-R1's release made from it."""


def _detect_format(path: Path) -> str:
    """A name of `FORMATS`, by the suffix and the keys of the first entry."""
    if path.suffix == ".txt":
        return "charades_text"
    if path.suffix == ".jsonl":
        keys = set[str]().union(*(row for _, row in islice(_json_rows(path), 1)))
        return "timelens" if "problem" in keys else "timelens_100k" if "events" in keys else "qvhighlights"
    content = _json_object(path)
    return "timelens_bench" if any("queries" in entry for entry in islice(content.values(), 1)) else "captions"

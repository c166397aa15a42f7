"""Published annotation files, each read into samples; an error names the place and the value."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.data.newer_formats import (
    FROM_FILE,
    UNTOLD,
    Fields,
    read_momentseeker,
    read_omtg,
    read_orarl,
    read_plain,
    read_timelens2,
    read_vue_tr,
)
from tempsamp_fast.data.prompts import SHORTEST_S, normalise_query
from tempsamp_fast.data.text_files import (
    as_float,
    as_number,
    get,
    json_object,
    json_rows,
    read_text,
    shown,
    text_lines,
    typed,
)
from tempsamp_fast.data.video_folder import NoDuration, VideoFolder
from tempsamp_fast.rewards import CLIP_S, parse_spans
from tempsamp_fast.sample import Sample, Span

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds."""

    samples: list[Sample]
    """In file order."""
    dropped: list[str]
    """Why a query is not among them, a line for each that names the file and the place."""
    untimed: list[str] = field(default_factory=list)
    """Videos whose length neither the file nor they themselves tell, a line for each; their queries are left out."""

    @property
    def num_late_ends(self) -> int:
        """Windows that end beyond the video."""
        return sum(end > sample.duration_s for sample in self.samples for _, end in sample.windows)


def load_annotations(path: str | Path, videos: str | Path | None = None, format: str = "auto") -> list[Sample]:
    """The samples of `read_annotations`; how many queries were dropped and how many windows end late is logged once.

    Raises as `read_annotations` does, and ValueError for videos whose length nothing tells.
    """
    annotations = read_annotations(path, videos, format)
    if annotations.untimed:
        first, *others = annotations.untimed
        raise ValueError(first + (f"; and so for {len(others)} more videos (data check lists them)" if others else ""))
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
    reader = FORMATS[_detect_format(path) if format == "auto" else format]
    folder = VideoFolder(videos)
    ids: set[str] = set()
    samples, dropped = [], []
    untimed: dict[str, str] = {}
    for record in reader(path):
        if record.sample_id in ids:
            raise ValueError(f"{record.place}: a sample of id {shown(record.sample_id)} came before")
        ids.add(record.sample_id)
        try:
            samples.append(_sample(record, folder))
        except _UnusableQuery as reason:
            dropped.append(str(reason))
        except NoDuration as error:
            untimed.setdefault(record.video_id, str(error))
    if not samples and not untimed:
        flaws = f"; dropped {len(dropped)}, the first: {dropped[0]}" if dropped else ""
        raise ValueError(f"{path}: no annotated query in it{flaws}")
    return Annotations(samples, dropped, list(untimed.values()))


def find_video(folder: str | Path, video_id: str) -> Path | None:
    """As `VideoFolder.find`, for one video."""
    return VideoFolder(folder).find(video_id)


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
    offline_ious: tuple[float, ...] = ()
    reasoning: Any = None


class _UnusableQuery(ValueError):
    """Well-formed, but nothing to learn from or to be tested on."""


def _sample(record: _Record, folder: VideoFolder) -> Sample:
    place = record.place
    duration = record.duration
    if duration is UNTOLD:
        duration = _last_end(record)
    elif duration is FROM_FILE:
        duration = folder.duration_s(place, record.video_id)
    duration_s = as_number(place, "duration", duration)
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


def _last_end(record: _Record) -> float:
    """In place of a duration that its publisher does not tell."""
    return max((end for _, end in typed(record.place, "windows", record.windows, list)), default=1.0)


def _window(place: str, window: Any, duration_s: float) -> Span:
    if len(typed(place, "window", window, (list, tuple))) != 2:
        raise ValueError(f"{place}: window {shown(window)} is not a pair of start and end")
    name = f"window {shown(window)}"
    start, end = (as_number(place, name, time) for time in window)
    if start < 0:
        raise _UnusableQuery(f"{place}: {name} starts before 0")
    if end <= start:
        raise _UnusableQuery(f"{place}: {name} does not end after its start")
    if start >= duration_s:
        raise _UnusableQuery(f"{place}: {name} starts at or beyond the duration {duration_s}")
    return start, end


def _read_by_video(path: Path, queries_key: str, windows_key: str) -> Iterator[_Record]:
    for video_id, fields in json_object(path).items():
        place = f"{path}: video {shown(video_id)}"
        typed(place, "entry", fields, dict)
        queries = typed(place, queries_key, get(place, fields, queries_key), list)
        windows = typed(place, windows_key, get(place, fields, windows_key), list)
        if len(queries) != len(windows):
            raise ValueError(f"{place}: {len(queries)} {queries_key} but {len(windows)} {windows_key}")
        duration = get(place, fields, "duration", "video_duration")
        for index, (query, window) in enumerate(zip(queries, windows, strict=True)):
            yield _Record(f"{place}, query {index}", f"{video_id}/{index}", video_id, query, duration, [window])


def _read_charades_text(path: Path) -> Iterator[_Record]:
    durations = _charades_durations(path)
    for number, line in text_lines(path):
        place = f"{path}: line {number}"
        times, separator, query = line.partition("##")
        if not separator or len(times.split()) != 3:
            raise ValueError(f"{place}: {shown(line)} is not `VIDEO start end##sentence`")
        video_id, *window = times.split()
        if video_id not in durations:
            raise ValueError(f"{place}: video {shown(video_id)} is not in the Charades_v1_*.csv beside the file")
        windows = [[as_float(place, time) for time in window]]
        yield _Record(
            f"{place}, video {shown(video_id)}", f"{video_id}/{number}", video_id, query, durations[video_id], windows
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
        try:
            for row in csv.DictReader(io.StringIO(read_text(table), newline="")):
                durations[get(str(table), row, "id")] = as_float(str(table), get(str(table), row, "length"))
        except csv.Error as error:
            raise ValueError(f"{table}: malformed table ({error})") from error
    return durations


def _read_qvhighlights(path: Path) -> Iterator[_Record]:
    for place, _, row in json_rows(path):
        video_id = typed(place, "vid", get(place, row, "vid"), str)
        place = f"{place}, video {shown(video_id)}"
        duration = get(place, row, "duration")
        yield _Record(
            place=place,
            sample_id=str(typed(place, "qid", get(place, row, "qid"), (int, str))),
            video_id=video_id,
            query=get(place, row, "query"),
            duration=duration,
            windows=get(place, row, "relevant_windows"),
            clip_scores=_clip_scores(place, row, as_number(place, "duration", duration)),
        )


def _clip_scores(place: str, row: dict[str, Any], duration_s: float) -> dict[int, tuple[int, ...]]:
    """Empty where there is no saliency at all, as in the files that moment_detr's form was made of for other data."""
    if "saliency_scores" not in row:
        return {}
    clips = typed(place, "relevant_clip_ids", get(place, row, "relevant_clip_ids"), list)
    scores = typed(place, "saliency_scores", get(place, row, "saliency_scores"), list)
    if len(clips) != len(scores):
        raise ValueError(f"{place}: {len(clips)} relevant_clip_ids but {len(scores)} saliency_scores")
    for clip, annotators in zip(clips, scores, strict=True):
        if type(clip) is not int or not 0 <= clip * CLIP_S < duration_s:
            raise ValueError(
                f"{place}: relevant_clip_ids has {shown(clip)}, expected an index of a {CLIP_S}-second clip"
            )
        if not annotators or any(score not in range(5) for score in typed(place, "saliency", annotators, list)):
            raise ValueError(
                f"{place}: saliency_scores has {shown(annotators)}, expected a list of whole numbers 0 to 4"
            )
    return {clip: tuple(annotators) for clip, annotators in zip(clips, scores, strict=True)}


def _read_timelens(path: Path) -> Iterator[_Record]:
    for place, number, row in json_rows(path):
        videos = typed(place, "videos", get(place, row, "videos"), list)
        if len(videos) != 1 or not isinstance(videos[0], str):
            raise ValueError(f"{place}: videos is {shown(videos)}, expected a list of one path")
        place = f"{place}, video {shown(videos[0])}"
        answer = typed(place, "answer", get(place, row, "answer"), str)
        windows = [list(span) for span in parse_spans(answer)]
        query, duration = get(place, row, "problem"), get(place, row, "duration")
        yield _Record(
            place, f"{videos[0]}/{number}", videos[0], query, duration, windows, difficulty=row.get("difficulty")
        )


def _read_fields(path: Path, reader: Callable[[Path], Iterator[Fields]]) -> Iterator[_Record]:
    return (_Record(**fields) for fields in reader(path))


def _read_time_r1(path: Path) -> Iterator[_Record]:
    for place, number, row in json_rows(path):
        video = typed(place, "video", get(place, row, "video"), str)
        place = f"{place}, video {shown(video)}"
        for name in ("video_start", "video_end"):
            if row.get(name) is not None:
                raise ValueError(f"{place}: {name} is {shown(row[name])}: cut the file there, stretches are not read")
        query, duration = get(place, row, "sentence"), get(place, row, "duration")
        windows = [get(place, row, "timestamp")]
        yield _Record(place, f"{video}/{number}", video, query, duration, windows, difficulty=row.get("difficulty"))


FORMATS: dict[str, Callable[[Path], Iterator[_Record]]] = {
    "captions": partial(_read_by_video, queries_key="sentences", windows_key="timestamps"),
    "charades_text": _read_charades_text,
    "momentseeker": partial(_read_fields, reader=read_momentseeker),
    "omtg": partial(_read_fields, reader=read_omtg),
    "orarl": partial(_read_fields, reader=read_orarl),
    "plain": partial(_read_fields, reader=read_plain),
    "qvhighlights": _read_qvhighlights,
    "time_r1": _read_time_r1,
    "timelens": _read_timelens,
    "timelens_100k": partial(_read_fields, reader=read_timelens2),
    "vue_tr": partial(_read_fields, reader=read_vue_tr),
    "timelens_bench": partial(_read_by_video, queries_key="queries", windows_key="spans"),
}
"""Readers by name. `captions` is the JSON of Charades-STA and of ActivityNet Captions; `qvhighlights` is moment_detr's
form, with saliency or without; `timelens_100k` is TimeLens-100K as published and TimeLens2-93K, whose rows may have
several spans and offline rollouts; `timelens` the rows of question and answer that TempSamp-R1's release made from it;
`time_r1` is the list of Time-R1, `orarl` the rows of OraRL, `omtg` the table of OMTG; `vue_tr` and `momentseeker` are
as published; `plain` is for data of one's own (see `newer_formats.read_plain`). Rows are JSON lines or one JSON list;
any file may be compressed by gzip."""


def _detect_format(path: Path) -> str:
    """A name of `FORMATS`, by the suffix and the keys of the first entry."""
    suffix = PurePath(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".txt", ".tsv"):
        return "charades_text" if suffix == ".txt" else "omtg"
    is_rows = suffix == ".jsonl" or read_text(path).lstrip().startswith("[")
    keys = set[str]().union(*(row for _, _, row in islice(json_rows(path), 1))) if is_rows else set[str]()
    if keys or suffix == ".jsonl":
        of_key = {"images": "orarl", "problem": "timelens", "sentence": "time_r1"}
        of_key |= dict.fromkeys(("events", "span"), "timelens_100k") | {"gt": "vue_tr", "qry_text": "momentseeker"}
        of_key |= dict.fromkeys(("start", "windows"), "plain")
        return next((name for key, name in of_key.items() if key in keys), "qvhighlights")
    entries = islice(json_object(path).values(), 1)
    return "timelens_bench" if any(isinstance(entry, dict) and "queries" in entry for entry in entries) else "captions"

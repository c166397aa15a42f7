"""The formats of annotation files, and how a file tells which one it has; an error names the place and the value."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from tempsamp_fast.data.newer_formats import (
    read_momentseeker,
    read_omtg,
    read_orarl,
    read_plain,
    read_timelens2,
    read_vue_tr,
)
from tempsamp_fast.data.record import Record
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
from tempsamp_fast.rewards import CLIP_S, parse_spans


def _read_by_video(path: Path, queries_key: str, windows_key: str) -> Iterator[Record]:
    for video_id, fields in json_object(path).items():
        place = f"{path}: video {shown(video_id)}"
        typed(place, "entry", fields, dict)
        queries = typed(place, queries_key, get(place, fields, queries_key), list)
        windows = typed(place, windows_key, get(place, fields, windows_key), list)
        if len(queries) != len(windows):
            raise ValueError(f"{place}: {len(queries)} {queries_key} but {len(windows)} {windows_key}")
        duration = get(place, fields, "duration", "video_duration")
        for index, (query, window) in enumerate(zip(queries, windows, strict=True)):
            yield Record(f"{place}, query {index}", f"{video_id}/{index}", video_id, query, duration, [window])


def _read_charades_text(path: Path) -> Iterator[Record]:
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
        yield Record(
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
                video_id = get(str(table), row, "id")
                place = f"{table}: video {shown(video_id)}, length"
                durations[video_id] = as_float(place, get(str(table), row, "length"))
        except csv.Error as error:
            raise ValueError(f"{table}: malformed table ({error})") from error
    return durations


def _read_qvhighlights(path: Path) -> Iterator[Record]:
    for place, _, row in json_rows(path):
        video_id = typed(place, "vid", get(place, row, "vid"), str)
        place = f"{place}, video {shown(video_id)}"
        duration = get(place, row, "duration")
        yield Record(
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


def _read_timelens(path: Path) -> Iterator[Record]:
    for place, number, row in json_rows(path):
        videos = typed(place, "videos", get(place, row, "videos"), list)
        if len(videos) != 1 or not isinstance(videos[0], str):
            raise ValueError(f"{place}: videos is {shown(videos)}, expected a list of one path")
        place = f"{place}, video {shown(videos[0])}"
        answer = typed(place, "answer", get(place, row, "answer"), str)
        windows = [list(span) for span in parse_spans(answer)]
        query, duration = get(place, row, "problem"), get(place, row, "duration")
        yield Record(
            place, f"{videos[0]}/{number}", videos[0], query, duration, windows, difficulty=row.get("difficulty")
        )


def _read_time_r1(path: Path) -> Iterator[Record]:
    for place, number, row in json_rows(path):
        video = typed(place, "video", get(place, row, "video"), str)
        place = f"{place}, video {shown(video)}"
        for name in ("video_start", "video_end"):
            if row.get(name) is not None:
                raise ValueError(f"{place}: {name} is {shown(row[name])}: cut the file there, stretches are not read")
        query, duration = get(place, row, "sentence"), get(place, row, "duration")
        windows = [get(place, row, "timestamp")]
        yield Record(place, f"{video}/{number}", video, query, duration, windows, difficulty=row.get("difficulty"))


FORMATS: dict[str, Callable[[Path], Iterator[Record]]] = {
    "captions": partial(_read_by_video, queries_key="sentences", windows_key="timestamps"),
    "charades_text": _read_charades_text,
    "momentseeker": read_momentseeker,
    "omtg": read_omtg,
    "orarl": read_orarl,
    "plain": read_plain,
    "qvhighlights": _read_qvhighlights,
    "time_r1": _read_time_r1,
    "timelens": _read_timelens,
    "timelens_100k": read_timelens2,
    "vue_tr": read_vue_tr,
    "timelens_bench": partial(_read_by_video, queries_key="queries", windows_key="spans"),
}
"""Readers by name. `captions` is the JSON of Charades-STA and of ActivityNet Captions; `qvhighlights` is moment_detr's
form, with saliency or without; `timelens_100k` is TimeLens-100K as published and TimeLens2-93K, whose rows may have
several spans and offline rollouts; `timelens` the rows of question and answer that TempSamp-R1's release made from it;
`time_r1` is the list of Time-R1, `orarl` the rows of OraRL, `omtg` the table of OMTG; `vue_tr` and `momentseeker` are
as published; `plain` is for data of one's own (see `newer_formats.read_plain`). Rows are JSON lines or one JSON list;
any file may be compressed by gzip."""


QVHIGHLIGHTS_KEYS = ("qid", "vid", "relevant_windows", "saliency_scores")
PLAIN_FORM = (
    "rows of one's own are JSON lines with video, query, and start and end or windows; docs/data.md has all forms"
)


def detect_format(path: Path) -> str:
    """A name of `FORMATS`, by the suffix and the keys of the first entry."""
    suffix = PurePath(path.name.lower().removesuffix(".gz")).suffix
    if suffix in (".txt", ".tsv"):
        return "charades_text" if suffix == ".txt" else "omtg"
    if suffix == ".csv":
        raise ValueError(f"{path}: of tables Charades-STA's .txt and OMTG's .tsv are read; {PLAIN_FORM}")
    if suffix == ".jsonl" or read_text(path).lstrip().startswith("["):
        first = next(json_rows(path), None)
        if first is None:
            return "plain"
        place, _, row = first
        of_key = {"images": "orarl", "problem": "timelens", "sentence": "time_r1", "events": "timelens_100k"}
        of_key |= {"video_path": "timelens_100k", "gt": "vue_tr", "qry_text": "momentseeker"}
        of_key |= dict.fromkeys(("start", "windows"), "plain") | dict.fromkeys(QVHIGHLIGHTS_KEYS, "qvhighlights")
        found = next((name for key, name in of_key.items() if key in row), None)
        if found is None:
            raise ValueError(f"{place}: of no form that is known by its fields, {shown(list(row))}; {PLAIN_FORM}")
        return found
    entries = islice(json_object(path).values(), 1)
    return "timelens_bench" if any(isinstance(entry, dict) and "queries" in entry for entry in entries) else "captions"

"""Annotation rows of the projects of 2026 (TimeLens2, OraRL, VUE-TR, MomentSeeker, OMTG), and of one's own."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tempsamp_fast.answers import read_json, read_pairs, read_strict, read_time_tags
from tempsamp_fast.data.record import FROM_FILE, UNTOLD, Record
from tempsamp_fast.data.text_files import as_number, get, json_rows, read_text, shown, typed
from tempsamp_fast.intervals import union_iou
from tempsamp_fast.sample import Span

QUOTES = "'\"\u2018\u2019\u201c\u201d"
MOST_CHARACTERS = 1 << 20
"""Of a field of a table."""


def read_timelens2(path: Path) -> Iterator[Record]:
    """TimeLens2-93K: rows of `events` as TimeLens-100K's, each of several spans; or one row a query, with `rollouts`.

    rollouts: answers that a model gave before, as texts or lists of spans, or their IoUs; `offline_ious` are theirs.
    """
    for place, number, row in json_rows(path):
        video = typed(place, "video_path", get(place, row, "video_path"), str)
        place = f"{place}, video {shown(video)}"
        duration = get(place, row, "duration")
        if "events" not in row:
            yield _timelens2_query(place, f"{video}/{number}", video, duration, row)
            continue
        for index, event in enumerate(typed(place, "events", row["events"], list)):
            name = f"{video}/{number}/{index}"
            yield _timelens2_query(f"{place}, query {index}", name, video, duration, typed(place, "event", event, dict))


def _timelens2_query(place: str, name: str, video: str, duration: Any, row: dict[str, Any]) -> Record:
    spans = typed(place, "span", get(place, row, "span"), list)
    windows = [spans] if len(spans) == 2 and not any(isinstance(each, list) for each in spans) else spans
    rollouts = typed(place, "rollouts", row.get("rollouts") or [], list)
    return Record(
        place=place,
        sample_id=name,
        video_id=video,
        query=get(place, row, "query"),
        duration=duration,
        windows=windows,
        offline_ious=tuple(_offline_iou(place, each, windows) for each in rollouts),
    )


def _offline_iou(place: str, rollout: Any, windows: list[Any]) -> float:
    if isinstance(rollout, (int, float)):
        iou = as_number(place, "rollouts", rollout)
        if not 0 <= iou <= 1:
            raise ValueError(f"{place}: rollouts has {shown(rollout)}, expected an IoU, a text or a list of spans")
        return iou
    said: Any = (read_json(rollout) or read_pairs(rollout) or []) if isinstance(rollout, str) else rollout
    return union_iou(_spans(place, "rollouts", said), _spans(place, "span", windows))


def _spans(place: str, name: str, spans: Any) -> list[Span]:
    for span in typed(place, name, spans, list):
        if len(typed(place, name, span, (list, tuple))) != 2:
            raise ValueError(f"{place}: {name} has {shown(span)}, expected a pair of start and end")
    return [(as_number(place, name, start), as_number(place, name, end)) for start, end in spans]


def read_orarl(path: Path) -> Iterator[Record]:
    """OraRL's rows of temporal grounding; those of other tasks (`problem_type`) are passed over.

    `answer` (or `solution`, `ground_truth`) is a pair of seconds or `<answer>A to B</answer>`, `problem` (or
    `question`, `prompt`) the query or the question that quotes it.
    """
    for place, number, row in json_rows(path):
        if "temporal" not in str(row.get("problem_type", "temporal")) or "spatial" in str(row.get("problem_type")):
            continue
        videos = typed(place, "videos", get(place, row, "videos"), list)
        entry = videos[0] if len(videos) == 1 else None
        video = get(place, entry, "video", "path") if isinstance(entry, dict) else entry
        if not isinstance(video, str):
            raise ValueError(f"{place}: videos is {shown(videos)}, expected a list of one path")
        place = f"{place}, video {shown(video)}"
        answer = get(place, row, "answer", "solution", "ground_truth")
        said = (read_strict(answer) or read_strict(f"<answer>{answer}</answer>")) if isinstance(answer, str) else None
        pairs = answer if isinstance(answer, list) and answer and isinstance(answer[0], list) else [answer]
        yield Record(
            place=place,
            sample_id=f"{video}/{number}",
            video_id=video,
            duration=row.get("duration", UNTOLD),
            query=quoted(typed(place, "problem", get(place, row, "problem", "question", "prompt"), str)),
            windows=[list(span) for span in said] if said else pairs,
        )


def read_vue_tr(path: Path) -> Iterator[Record]:
    """VUE-TR: rows of `query_id`, `video`, `duration`, `query` and `gt`, a list of spans."""
    for place, _, row in json_rows(path):
        video = typed(place, "video", get(place, row, "video"), str)
        yield Record(
            place=f"{place}, video {shown(video)}",
            sample_id=str(get(place, row, "query_id")),
            video_id=video,
            query=get(place, row, "query"),
            duration=get(place, row, "duration"),
            windows=get(place, row, "gt"),
        )


def read_momentseeker(path: Path) -> Iterator[Record]:
    """MomentSeeker's t2v.json: `src_video_path`, `qry_text` and `answering_time_interval`, a span or a list of them."""
    for place, number, row in json_rows(path):
        video = typed(place, "src_video_path", get(place, row, "src_video_path"), str)
        spans = typed(place, "answering_time_interval", get(place, row, "answering_time_interval"), list)
        yield Record(
            place=f"{place}, video {shown(video)}",
            sample_id=f"{video}/{number}",
            video_id=video,
            query=get(place, row, "qry_text"),
            duration=row.get("duration", UNTOLD),
            windows=spans if spans and isinstance(spans[0], list) else [spans],
        )


def read_omtg(path: Path) -> Iterator[Record]:
    """OMTG's table: columns `video`, `question`, `answer`, tab between; the answer names spans in time tags."""
    csv.field_size_limit(MOST_CHARACTERS)
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    try:
        for number, row in enumerate(table, start=1):
            place = f"{path}: row {number}"
            video = str(get(place, row, "video"))
            answer = str(get(place, row, "answer"))
            yield Record(
                place=f"{place}, video {shown(video)}",
                sample_id=f"{video}/{number}",
                video_id=video,
                query=quoted(str(get(place, row, "question"))),
                duration=UNTOLD,
                windows=[list(span) for span in read_time_tags(answer) or []],
            )
    except csv.Error as error:
        raise ValueError(f"{path}: malformed table ({error})") from error


def quoted(question: str) -> str:
    """The query that a question quotes, from the first quotation mark to the last; all of it where none is quoted."""
    is_inside_a_word = lambda index: question[index - 1 : index].isalnum() and question[index + 1 : index + 2].isalnum()
    marks = [index for index, letter in enumerate(question) if letter in QUOTES and not is_inside_a_word(index)]
    inside = question[marks[0] + 1 : marks[-1]].strip() if len(marks) > 1 else ""
    return inside or question.replace("<video>", "").strip()


def read_plain(path: Path) -> Iterator[Record]:
    """Rows of `video`, `query`, `start` and `end` in seconds, or `windows`: a list of such pairs.

    Where wanted `duration` (else that of the video), `id`, `difficulty`, `reasoning` (thought before the answer).
    """
    for place, number, row in json_rows(path):
        video = typed(place, "video", get(place, row, "video"), str)
        place = f"{place}, video {shown(video)}"
        span = [[get(place, row, "start"), get(place, row, "end")]] if "windows" not in row or "start" in row else None
        if span and row.get("windows", span) != span:
            raise ValueError(f"{place}: windows and start and end tell different spans; leave one out")
        yield Record(
            place=place,
            sample_id=str(typed(place, "id", row.get("id", f"{video}/{number}"), (int, str))),
            video_id=video,
            query=get(place, row, "query"),
            duration=row.get("duration", FROM_FILE),
            windows=span or row["windows"],
            difficulty=row.get("difficulty"),
            reasoning=_reasoning(place, row.get("reasoning")),
        )


def _reasoning(place: str, text: Any) -> str | None:
    """A thought that goes between `<think>` and `</think>` as it is."""
    if text is None:
        return None
    thought = typed(place, "reasoning", text, str).strip()
    tag = re.search(r"<\|\w*|</?(think|answer|tool_call|tool_response)\b", thought)
    if tag or not thought:
        found = f"holds {shown(tag[0])}" if tag else "is empty"
        raise ValueError(f"{place}: reasoning {found}; expected what is thought, without tags around it")
    return thought

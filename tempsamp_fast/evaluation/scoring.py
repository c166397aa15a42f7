"""How good predictions are: the paper's grounding and highlight metrics, without the training stack."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from tempsamp_fast.data.prompts import normalise_query
from tempsamp_fast.data.text_files import get, json_rows, shown, typed
from tempsamp_fast.data.video_folder import VIDEO_SUFFIXES
from tempsamp_fast.rewards import CLIP_S, best_iou, parse_highlights, read_spans, temporal_iou
from tempsamp_fast.sample import AnswerForm, Sample, Span, Task

RECALL_THRESHOLDS = (0.3, 0.5, 0.7)
MAP_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
MAX_WINDOWS = 10
VERY_GOOD = 4


def grounding_scores(ious: Sequence[float | None]) -> dict[str, float]:
    """`miou`, `r1@0.3`, `r1@0.5`, `r1@0.7` and `parse_rate`, all in [0, 1], over every query.

    `ious` holds one IoU per query, None where the answer did not parse: that counts as IoU 0.
    Raises ValueError when there is no query.
    """
    if not ious:
        raise ValueError("ious is empty: nothing to score")
    values = np.array([iou or 0.0 for iou in ious])
    recalls = {f"r1@{threshold}": float(np.mean(values >= threshold)) for threshold in RECALL_THRESHOLDS}
    parse_rate = float(np.mean([iou is not None for iou in ious]))
    return {"miou": float(values.mean()), **recalls, "parse_rate": parse_rate}


def answered_ious(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Of the rows that an evaluation leaves, one per query: None where the answer did not parse."""
    return [None if row["span"] is None else row["iou"] for row in rows]


def oracle_ious(ious_by_mode: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The best IoU of each query over the modes: the paper's "mixed CoT", an upper bound that looks at the truth."""
    answered = ([iou for iou in ious if iou is not None] for ious in zip(*ious_by_mode, strict=True))
    return [max(ious, default=None) for ious in answered]


def score_spans(samples: Sequence[Sample], spans: Sequence[Span | None]) -> dict[str, float]:
    """`grounding_scores` of one predicted span per sample, each against the true window it fits best."""
    return grounding_scores(
        [None if span is None else best_iou(span, s.windows) for s, span in zip(samples, spans, strict=True)]
    )


def window_average_precision(predicted: Sequence[Span], windows: Sequence[Span], threshold: float) -> float:
    """AP of the windows predicted for one query, most confident first, at one IoU threshold.

    As in moment_detr's standalone evaluation: at most 10 predictions count; each takes the free true window it overlaps
    most (on a tie the last one) and is right if that IoU reaches the threshold; AP is the area under precision over
    recall, precision made non-increasing. Nothing predicted scores 0 (there such queries are left out of the mean).
    """
    free = list(reversed(windows))
    hits = []
    for span in predicted[:MAX_WINDOWS]:
        best = max(free, key=lambda window: temporal_iou(span, window), default=None)
        hits.append(best is not None and temporal_iou(span, best) >= threshold)
        if best is not None and hits[-1]:
            free.remove(best)
    if not any(hits):
        return 0.0
    right = np.array(hits)
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / len(windows))


def moment_retrieval_scores(samples: Sequence[Sample], predicted: Sequence[Sequence[Span]]) -> dict[str, float]:
    """`mr_map`, `mr_map@0.5` and `mr_map@0.75`: the mean `window_average_precision` over the queries.

    `mr_map` itself is the mean over the IoU thresholds 0.5, 0.55, ... 0.95.
    """
    table = np.array(
        [
            [window_average_precision(spans, sample.windows, threshold) for threshold in MAP_THRESHOLDS]
            for sample, spans in zip(samples, predicted, strict=True)
        ]
    )
    at = {f"mr_map@{threshold}": float(table[:, MAP_THRESHOLDS.index(threshold)].mean()) for threshold in (0.5, 0.75)}
    return {"mr_map": float(table.mean()), **at}


def ranking_average_precision(relevant: np.ndarray, scores: np.ndarray) -> float:
    """AP of one annotator's relevant clips ([num_clips] bool) under predicted scores ([num_clips]).

    As in moment_detr's standalone evaluation: equal scores form one rank; AP is the mean, over the ranks that hold a
    relevant clip, of the precision there, made non-increasing; 0 when no clip is relevant, 1 when all are.
    """
    if relevant.all() or not relevant.any():
        return float(relevant.any())
    order = np.argsort(-scores, kind="stable")
    rank_ends = np.flatnonzero(np.diff(scores[order], append=np.nan))
    num_relevant = np.cumsum(relevant[order])[rank_ends]
    envelope = np.maximum.accumulate((num_relevant / (rank_ends + 1))[::-1])[::-1]
    return float(envelope[np.diff(num_relevant, prepend=0) > 0].mean())


def highlight_scores(samples: Sequence[Sample], predicted: Sequence[Mapping[float, float] | None]) -> dict[str, float]:
    """`hl_map` and `hit@1` for clips an annotator rated Very Good (4), in [0, 1], over every query.

    `predicted` holds saliency by timestamp in seconds. As in moment_detr's standalone evaluation: a query's clips are
    the int(duration / 2) whole ones, a clip not predicted scores 0; `hl_map` is `ranking_average_precision` per
    annotator, then the mean; `hit@1` is 1 where any annotator rated the highest scored clip (the first one on a tie)
    Very Good. No prediction for a query (None or empty) counts 0 in both.
    """
    precisions, hits = [], []
    for sample, saliency in zip(samples, predicted, strict=True):
        very_good = _very_good(sample)
        scores = np.zeros(len(very_good))
        for clip in range(len(very_good)):
            scores[clip] = (saliency or {}).get(float(CLIP_S * clip), 0.0)
        by_annotator = [ranking_average_precision(relevant, scores) for relevant in very_good.T]
        precisions.append(sum(by_annotator) / len(by_annotator) if saliency else 0.0)
        hits.append(bool(saliency) and bool(very_good[scores.argmax()].any()))
    return {"hl_map": float(np.mean(precisions)), "hit@1": float(np.mean(hits))}


def _very_good(sample: Sample) -> np.ndarray:
    """[num_clips, num_annotators] bool."""
    if not sample.clip_scores:
        raise ValueError(
            f"sample {sample.sample_id!r} has no clip scores; highlight metrics need QVHighlights annotations"
        )
    num_annotators = max(len(scores) for scores in sample.clip_scores.values())
    rated = np.zeros((int(sample.duration_s / CLIP_S), num_annotators), dtype=bool)
    for clip, scores in sample.clip_scores.items():
        if clip < len(rated):
            rated[clip, : len(scores)] = np.array(scores) >= VERY_GOOD
    return rated


def best_constant_span(samples: Sequence[Sample], num_steps: int = 48, num_rounds: int = 3) -> tuple[Span, float]:
    """The one span, in seconds, that answers all of `samples` best, and its mean IoU: the baseline that never looks.

    A search over a grid of `num_steps` starts and ends, refined `num_rounds` times around the best pair.
    """
    starts, ends = np.array([window for sample in samples for window in sample.windows]).T
    first_window = np.cumsum([0] + [len(sample.windows) for sample in samples[:-1]])

    def mean_iou(start: float, end: float) -> float:
        overlap = np.clip(np.minimum(ends, end) - np.maximum(starts, start), 0, None)
        ious = overlap / (np.maximum(ends, end) - np.minimum(starts, start))
        return float(np.maximum.reduceat(ious, first_window).mean())

    def best_of(grid_starts: np.ndarray, grid_ends: np.ndarray) -> tuple[float, Span]:
        pairs = ((float(start), float(end)) for start in grid_starts for end in grid_ends if end > start)
        return max((mean_iou(*pair), pair) for pair in pairs)

    step = float(ends.max()) / num_steps
    grid = step * np.arange(num_steps + 1)
    miou, span = best_of(grid, grid)
    around = np.linspace(-1, 1, 9)
    for _ in range(num_rounds):
        miou, span = best_of(np.clip(span[0] + step * around, 0, None), span[1] + step * around)
        step /= 4
    return span, miou


def read_predictions(path: str | Path, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One row of the JSON lines file `path` per sample, in the samples' order.

    A row names its sample by `sample_id` or `qid`, or by `vid` (the video's id or path, or as much of its end as tells
    it from others) and `query`. Where a video has the same query several times, its rows are taken in the order of the
    samples; a single one answers them all. Raises ValueError naming the line that names no sample, several videos, the
    same sample twice or predicts nothing that can be scored, and the samples without a row.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    by_query: dict[tuple[str, str], dict[Path, list[str]]] = {}
    for sample in samples:
        videos = by_query.setdefault((sample.video_id, normalise_query(sample.query)), {})
        videos.setdefault(sample.video, []).append(sample.sample_id)
    rows: dict[str, dict[str, Any]] = {}
    for place, _, row in json_rows(Path(path)):
        key = next((key for key in ("sample_id", "qid") if key in row), None)
        if key is not None:
            ids, name = [str(row[key])] if str(row[key]) in by_id else [], f"{key} {shown(row[key])}"
        else:
            vid, query = (str(typed(place, field, get(place, row, field), str)) for field in ("vid", "query"))
            query = normalise_query(query)
            ids, name = _asked(by_query, vid, query, place), f"vid {shown(vid)} with query {shown(query)}"
        if not ids:
            raise ValueError(f"{place}: {name} is not in the annotations")
        free = next((sample_id for sample_id in ids if sample_id not in rows), None)
        if free is None:
            raise ValueError(f"{place}: {name} has a prediction already")
        try:
            _check(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        rows[free] = row
    for ids in (ids for videos in by_query.values() for ids in videos.values()):
        given = [rows[sample_id] for sample_id in ids if sample_id in rows]
        if len(given) == 1 and not {"sample_id", "qid"} & given[0].keys():
            rows |= dict.fromkeys(ids, given[0])
    missing = [sample.sample_id for sample in samples if sample.sample_id not in rows]
    if missing:
        raise ValueError(f"{path}: no prediction for {len(missing)} of {len(samples)} samples: {_some(missing)}")
    return [rows[sample.sample_id] for sample in samples]


def _asked(by_query: Mapping[tuple[str, str], Mapping[Path, list[str]]], vid: str, query: str, place: str) -> list[str]:
    """The samples that ask `query` of the one video whose path, with its suffix or without, ends with `vid`."""
    *folders, name = PurePath(vid).parts or ("",)
    videos = {
        video: ids for stem in {name, PurePath(name).stem} for video, ids in by_query.get((stem, query), {}).items()
    }
    alike = {video: ids for video, ids in videos.items() if _is_named(video, name) and _ends_alike(video, folders)}
    found = [(video, ids) for video, ids in alike.items() if name in (video.name, video.stem)] or list(alike.items())
    if len(found) > 1:
        several = _some([str(video) for video, _ in found])
        raise ValueError(f"{place}: vid {shown(vid)} is of {len(found)} videos: {several}; name its folder too")
    return found[0][1] if found else []


def _is_named(video: Path, name: str) -> bool:
    """Any ending may be told of a file that is not here: its own is a guess then."""
    suffix = PurePath(name).suffix.lower()
    may_be = suffix == video.suffix.lower() or (suffix in VIDEO_SUFFIXES and not video.exists())
    return name == video.stem or (may_be and PurePath(name).stem == video.stem)


def _ends_alike(video: Path, folders: Sequence[str]) -> bool:
    """Where nothing says in which folder the videos are, the folders of one side are not all known."""
    pairs = list(zip(reversed(video.parent.parts), reversed(folders), strict=False))
    return all(ours == theirs for ours, theirs in pairs) and (len(pairs) == len(folders) or not video.is_absolute())


def _check(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a row that no task can score, whatever its answer says."""
    if row.get("text") is not None:
        typed(f"prediction {shown(dict(row))}", "text", row["text"], str)
    elif "pred_saliency_scores" in row:
        _row_saliency(row, True)
    if "pred_saliency_scores" not in row:
        row_spans(row, lambda text: None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def score_rows(
    samples: Sequence[Sample],
    rows: Iterable[Mapping[str, Any]],
    task: Task,
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
) -> dict[str, float]:
    """The metrics of `task` for one prediction row per sample: its `text`, or else what a model without words predicts.

    That is `pred_saliency_scores` for `highlight`: numbers in the order of the 2-second clips, the higher the better.
    For the other tasks it is a `span`, `spans`, the most confident first, or `pred_relevant_windows` of (start, end,
    confidence). `grounding` takes the last span of a text and the most confident one of several, `multi_grounding` the
    first one for mIoU and R1; answers of another form than `text` begin with the one that counts. `require_tags=False`
    reads texts without `<answer>` tags too.

    Raises ValueError naming the row that has none of these or something else in their place.
    """
    rows = list(rows)
    if task == "highlight":
        highlights = [_row_saliency(row, require_tags) for row in rows]
        return {
            **highlight_scores(samples, highlights),
            "parse_rate": float(np.mean([bool(each) for each in highlights])),
        }
    read = lambda text: read_spans(text, answer_form, require_tags)
    predicted = [row_spans(row, read) or [] for row in rows]
    if task == "grounding":
        place_of_answer = [-1 if answer_form == "text" and row.get("text") is not None else 0 for row in rows]
        answers = [spans[place] if spans else None for spans, place in zip(predicted, place_of_answer, strict=True)]
        return score_spans(samples, answers)
    first = [spans[0] if spans else None for spans in predicted]
    return {**score_spans(samples, first), **moment_retrieval_scores(samples, predicted)}


def _row_saliency(row: Mapping[str, Any], require_tags: bool) -> dict[float, float] | None:
    if row.get("text") is not None:
        return parse_highlights(str(row["text"]), require_tags)
    if "pred_saliency_scores" not in row:
        raise ValueError(f"prediction {shown(dict(row))} has no text or pred_saliency_scores")
    scores = row["pred_saliency_scores"]
    if not isinstance(scores, list) or not all(map(_is_number, scores)):
        raise ValueError(f"prediction {shown(dict(row))}: pred_saliency_scores is not a list of numbers")
    return {float(CLIP_S * clip): float(score) for clip, score in enumerate(scores)}


def row_spans(row: Mapping[str, Any], read: Callable[[str], list[Span] | None]) -> list[Span] | None:
    """What `read` makes of a prediction row's `text`, or the row's own spans, the most confident first.

    None where nothing is read, where a time is not finite, and for a row that predicts no span. Raises ValueError for a
    row that has neither.
    """
    if row.get("text") is not None:
        said = read(str(row["text"]))
        return said if said is None or all(math.isfinite(time) for span in said for time in span) else None
    key = next((key for key in ("pred_relevant_windows", "spans", "span") if key in row), None)
    if key is None:
        raise ValueError(f"prediction {shown(dict(row))} has no text, span, spans or pred_relevant_windows")
    spans: list[Any] = row[key] if key != "span" else [row[key]] if row[key] is not None else []
    if not isinstance(spans, list):
        raise ValueError(f"prediction {shown(dict(row))}: {key} is not a list")
    numbers = ("start", "end", "confidence") if key == "pred_relevant_windows" else ("start", "end")
    for span in spans:
        if not isinstance(span, list) or len(span) != len(numbers) or not all(map(_is_number, span)):
            expected = f"expected the numbers {', '.join(numbers)}"
            raise ValueError(f"prediction {shown(dict(row))}: {key} has {shown(span)}, {expected}")
    if key == "pred_relevant_windows":
        spans = sorted(spans, key=lambda span: -span[2])
    return [(float(start), float(end)) for start, end, *_ in spans] or None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

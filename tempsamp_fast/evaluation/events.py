"""Answers that name every span of a query: OMTG's metrics (arXiv 2606.06294)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tempsamp_fast.intervals import union_iou
from tempsamp_fast.rewards import temporal_iou
from tempsamp_fast.sample import Span

THRESHOLDS = (0.3, 0.5, 0.7)


def etf1(predicted: Sequence[Span], windows: Sequence[Span]) -> dict[str, float]:
    """Of one query, in [0, 1]: `c_acc`, `tiou`, `tf1@0.3`, `tf1@0.5`, `tf1@0.7` and `etf1`.

    `c_acc` is 1 where as many spans are predicted as there are, `tiou` the IoU of both unions. Spans are matched one to
    one so that the sum of IoUs is largest; `tf1` is the F1 score of matches that reach a threshold; `etf1` is `c_acc`
    times their mean. Both sides empty is 1 in all but `tiou`, one side empty is 0.
    """
    counts = len(predicted), len(windows)
    table = np.array([[temporal_iou(span, window) for window in windows] for span in predicted]).reshape(counts)
    matched = [table[row, column] for row, column in best_matching(table)]
    scores = {"c_acc": float(counts[0] == counts[1]), "tiou": union_iou(predicted, windows)}
    for threshold in THRESHOLDS:
        hits = sum(iou >= threshold for iou in matched)
        scores[f"tf1@{threshold}"] = 2 * hits / sum(counts) if any(counts) else 1.0
    return scores | {"etf1": scores["c_acc"] * float(np.mean([scores[f"tf1@{each}"] for each in THRESHOLDS]))}


def best_matching(values: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column) of a [R, C] table, min(R, C) of them, whose values add up to the most.

    The Hungarian method with potentials, as O(R^2 C): a row after the other is added along a shortest augmenting path.
    """
    if values.shape[0] > values.shape[1]:
        return sorted((row, column) for column, row in best_matching(values.T))
    num_rows, num_columns = values.shape
    of_row, of_column = np.zeros(num_rows + 1), np.zeros(num_columns + 1)
    owner = np.full(num_columns + 1, num_rows)  # the last column stands before the path, the last row for nobody
    for row in range(num_rows):
        owner[-1], column = row, num_columns
        shortest, before = np.full(num_columns, np.inf), np.full(num_columns, num_columns)
        visited = np.zeros(num_columns + 1, dtype=bool)
        while owner[column] != num_rows:
            visited[column] = True
            reduced = -values[owner[column]] - of_row[owner[column]] - of_column[:-1]
            is_closer = ~visited[:-1] & (reduced < shortest)
            shortest[is_closer], before[is_closer] = reduced[is_closer], column
            free = np.where(visited[:-1], np.inf, shortest)
            step, following = free.min(), int(free.argmin())
            of_row[owner[visited]] += step
            of_column[visited] -= step
            shortest[~visited[:-1]] -= step
            column = following
        while column != num_columns:
            owner[column], column = owner[before[column]], before[column]
    return sorted((int(owner[column]), column) for column in range(num_columns) if owner[column] < num_rows)


def threshold_auc(ious: Sequence[float]) -> float:
    """VUE-TR's area, by trapezoids, under the share of queries whose IoU is over a threshold of 0, .01, ... 1."""
    thresholds = np.arange(101) / 100
    shares = (np.array(ious)[:, None] > thresholds).mean(axis=0)
    return float((shares[1:] + shares[:-1]).sum() / 200)


def event_scores(samples_windows: Sequence[Sequence[Span]], predicted: Sequence[Sequence[Span]]) -> dict[str, float]:
    """The means of `etf1` over queries. Raises ValueError when there is none."""
    if not predicted:
        raise ValueError("predicted is empty: nothing to score")
    scores = [etf1(spans, windows) for spans, windows in zip(predicted, samples_windows, strict=True)]
    return {name: float(np.mean([each[name] for each in scores])) for name in scores[0]}

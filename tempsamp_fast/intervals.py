"""Sets of time spans: merged, measured and compared exactly."""

from __future__ import annotations

from collections.abc import Sequence

from tempsamp_fast.sample import Span


def merge(spans: Sequence[Span]) -> list[Span]:
    """The union as spans that neither touch nor overlap, in order; empty ones are dropped."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[1] > span[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(spans: Sequence[Span]) -> float:
    """Sum of `end - start`, in seconds."""
    return sum(end - start for start, end in spans)


def overlap(a: Sequence[Span], b: Sequence[Span]) -> float:
    """What every span of `a` shares with every span of `b`, in seconds, added up."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def union_iou(a: Sequence[Span], b: Sequence[Span]) -> float:
    """IoU of two sets of spans, each taken as the union of its spans; 0 when both are empty."""
    merged_a, merged_b = merge(a), merge(b)
    covered, intersection = length(merged_a) + length(merged_b), overlap(merged_a, merged_b)
    return intersection / (covered - intersection) if covered else 0.0


def wasserstein_1(a: Sequence[Span], b: Sequence[Span]) -> float:
    """The W1 distance, in seconds, of the uniform distributions on the unions of `a` and of `b` (TimeLens2).

    The area between their distribution functions, which are lines between the ends of spans: exact, also where the two
    cross between ends. Raises ValueError for a union that is empty.
    """
    merged_a, merged_b = merge(a), merge(b)
    if not merged_a or not merged_b:
        raise ValueError("W1 is of spans that are not empty")
    times = sorted({time for span in (*merged_a, *merged_b) for time in span})
    gaps = [_share_before(merged_a, time) - _share_before(merged_b, time) for time in times]
    area = 0.0
    for start, end, first, last in zip(times, times[1:], gaps, gaps[1:], strict=False):
        if first * last >= 0:
            area += (end - start) * abs(first + last) / 2
        else:  # two triangles
            area += (end - start) * (first * first + last * last) / (2 * (abs(first) + abs(last)))
    return area


def _share_before(merged: Sequence[Span], time: float) -> float:
    """Of the spans' length, the share that lies before `time`."""
    return sum(min(max(time - start, 0.0), end - start) for start, end in merged) / length(merged)

"""Reading answers and rewarding them; training and evaluation share this parser.

A reward is `f(completions, *, samples, require_tags=True, **_) -> list[float]`: the generated texts and, aligned with
them, the samples they answer. To add one, write such a function, name it in `REWARDS`, and point the task that should
use it there in `TASK_REWARDS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tempsamp_fast import answers
from tempsamp_fast.intervals import length, merge, overlap, wasserstein_1
from tempsamp_fast.intervals import union_iou as multi_segment_iou
from tempsamp_fast.sample import AnswerForm, Sample, Span, Task
from tempsamp_fast.times import joined, read_times

Reward = Callable[..., list[float]]

CLIP_S = 2
"""Length in seconds of the clips that QVHighlights annotates."""

# The innermost closed block: an unclosed <answer> before it does not stretch it.
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)

_THINK_THEN_ANSWER = re.compile(r"<think>.*</think>\s*<answer>.*</answer>", re.IGNORECASE | re.DOTALL)


def answer_text(text: str, require_tags: bool = True) -> str:
    """What stands inside the last `<answer> </answer>` of `text`; without one, nothing if `require_tags`, else all."""
    blocks = _ANSWER.findall(text)
    return blocks[-1] if blocks else "" if require_tags else text


def parse_spans(text: str, require_tags: bool = True) -> list[Span]:
    """Every `A to B`, `A and B` or `A - B` of the last answer block, in order.

    Of pairs that share a time, as in `5 and 12 to 20`, the later one counts. What counts as a time is told in
    `times`; none is rounded. A pair whose end is not after its start is returned as written. `require_tags=False` reads
    the whole text where there is no answer block.
    """
    answer = answer_text(text, require_tags)
    times = read_times(answer)
    spans: list[Span] = []
    index = len(times) - 2
    while index >= 0:
        span = joined(answer, times[index], times[index + 1])
        spans += [span] if span else []
        index -= 2 if span else 1
    return spans[::-1]


def parse_span(text: str, require_tags: bool = True) -> Span | None:
    """The last span of `parse_spans`, or None when there is none."""
    spans = parse_spans(text, require_tags)
    return spans[-1] if spans else None


READERS: dict[AnswerForm, Callable[[str], list[Span] | None]] = {
    "example": answers.read_release,
    "sentence": answers.read_pairs,
    "json": answers.read_json,
    "strict": answers.read_strict,
    "time_tags": answers.read_time_tags,
}
"""How the forms of others are read; `text` is read by `parse_spans`."""


def read_spans(text: str, answer_form: AnswerForm = "text", require_tags: bool = True) -> list[Span] | None:
    """The spans that an answer of the given form names, in its order; None where nothing can be read.

    require_tags: of the form `text` alone; the others have their own marks.
    """
    spans = (parse_spans(text, require_tags) or None) if answer_form == "text" else READERS[answer_form](text)
    return spans if spans is None or all(math.isfinite(time) for span in spans for time in span) else None


def answered_span(text: str, answer_form: AnswerForm = "text", require_tags: bool = True) -> Span | None:
    """The one span that counts: the last of `text`, the first of the other forms; None when there is none.

    require_tags: as of `read_spans`.
    """
    if answer_form == "text":
        return parse_span(text, require_tags)
    spans = read_spans(text, answer_form)
    return spans[0] if spans else None


def parse_highlights(text: str, require_tags: bool = True) -> dict[float, float] | None:
    """Saliency by timestamp in seconds, from the last answer block; None when it does not follow the prompt's form.

    A timestamp without its score (an answer cut off, lists of different lengths) is dropped; of a repeated timestamp
    the first counts. A number that can be read in two ways (`82,84`) makes the whole answer unreadable: None.
    """
    before, saliency, after = answer_text(text, require_tags).lower().partition("saliency scores")
    if not saliency or "timestamps" not in before:
        return None
    timestamps, scores = ([time.seconds for time in read_times(part)] for part in (before, after))
    highlights: dict[float, float] = {}
    for timestamp, score in zip(timestamps, scores, strict=False):
        if timestamp is None or score is None:
            return None
        highlights.setdefault(timestamp, score)
    return highlights


def highlight_targets(sample: Sample) -> dict[float, float]:
    """True saliency by timestamp in seconds: every clip the annotators score above 0 on average, that mean plus 1.

    One decimal, on the scale 1 to 5 that the prompt names.
    """
    means = {clip: sum(scores) / len(scores) for clip, scores in sorted(sample.clip_scores.items())}
    return {float(CLIP_S * clip): round(mean + 1, 1) for clip, mean in means.items() if mean > 0}


def temporal_iou(a: Span, b: Span) -> float:
    """Intersection over the union's hull, in [0, 1]; 0 when either end is not after its start."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) / (max(a[1], b[1]) - min(a[0], b[0]))


def is_outside(span: Span | None, duration_s: float) -> bool:
    """Whether an answered span goes on beyond the video, by more than rounding to two decimals explains."""
    return span is not None and max(span) > duration_s + 0.005


def best_iou(span: Span | None, windows: Sequence[Span]) -> float:
    """IoU of `span` with the window it fits best; 0 for no span (an answer that did not parse)."""
    if span is None:
        return 0.0
    return max((temporal_iou(span, window) for window in windows), default=0.0)


def tiou_reward(
    completions: Sequence[str],
    *,
    samples: Sequence[Sample],
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
    **_: Any,
) -> list[float]:
    """IoU of the answered span with the true one (with the best fitting one where the query has several)."""
    return [
        best_iou(answered_span(text, answer_form, require_tags), sample.windows)
        for text, sample in zip(completions, samples, strict=True)
    ]


def location_reward(
    completions: Sequence[str],
    *,
    samples: Sequence[Sample],
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
    **_: Any,
) -> list[float]:
    """IoU with the window that fits best, less by the share of the video that either end is off (Time-R1, TaRO)."""
    spans = [answered_span(text, answer_form, require_tags) for text in completions]
    return [
        max((_located_iou(span, window, sample.duration_s) for window in sample.windows), default=0.0) if span else 0.0
        for span, sample in zip(spans, samples, strict=True)
    ]


def _located_iou(span: Span, window: Span, duration_s: float) -> float:
    near = [max(0.0, 1 - abs(said - true) / duration_s) for said, true in zip(span, window, strict=True)]
    return temporal_iou(span, window) * near[0] * near[1]


def multi_tiou_reward(
    completions: Sequence[str],
    *,
    samples: Sequence[Sample],
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
    **_: Any,
) -> list[float]:
    """IoU of the union of all answered spans with the union of all true ones (as VideoChat-R1's glue reward)."""
    return [
        multi_segment_iou(read_spans(text, answer_form, require_tags) or [], sample.windows)
        for text, sample in zip(completions, samples, strict=True)
    ]


def wasserstein_reward(
    completions: Sequence[str],
    *,
    samples: Sequence[Sample],
    beta: float = 1.0,
    with_iou: bool = True,
    parse_penalty: float = 1.0,
    require_tags: bool = True,
    answer_form: AnswerForm | None = None,
    **_: Any,
) -> list[float]:
    """TimeLens2 (arXiv 2607.17423): `exp(-beta * W1 / L)`, plus the IoU of all spans, less a penalty for no answer.

    W1 is that of the uniform distributions on the merged answered and true spans, L the length of the merged true ones,
    so that an answer that misses still tells how far it is off. An empty answer and one with an empty span earn 0 in
    both terms, one that cannot be read `-parse_penalty`. `answer_form=None` reads `A to B, C to D` in answer tags, else
    JSON.
    """
    values = []
    for text, sample in zip(completions, samples, strict=True):
        forms: tuple[AnswerForm, ...] = ("text", "json") if answer_form is None else (answer_form,)
        read = (spans for form in forms if (spans := read_spans(text, form, require_tags)) is not None)
        spans = next(read, None)
        values.append(-parse_penalty if spans is None else _transport_score(spans, sample.windows, beta, with_iou))
    return values


def _transport_score(spans: Sequence[Span], windows: Sequence[Span], beta: float, with_iou: bool) -> float:
    if not spans and not windows:
        return 1.0 + with_iou
    if not spans or not windows or any(start >= end for start, end in spans):
        return 0.0
    closeness = math.exp(-beta * wasserstein_1(spans, windows) / length(merge(windows)))
    merged = merge(spans)
    shared = overlap(merged, windows)
    return closeness + with_iou * shared / (length(merged) + length(windows) - shared)


def soft_overlong(num_tokens: int, max_tokens: int, cache: int) -> float:
    """DAPO (arXiv 2503.14476): 0 up to `max_tokens - cache`, down to -1 at `max_tokens` in a line, -1 beyond."""
    return -min(max((num_tokens - (max_tokens - cache)) / cache, 0.0), 1.0)


def format_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """1 where the text is exactly one `<think>` block followed by one `<answer>` block, else 0."""
    return [float(_is_think_then_answer(text)) for text in completions]


def answer_format_reward(completions: Sequence[str], *, answer_form: AnswerForm = "text", **_: Any) -> list[float]:
    """1 where the text has the form that is asked for without thoughts, else 0.

    Of `text` and `strict`: an optional think block, then exactly one answer block, and nothing else (OraRL). Of
    `example`: an answer block holds a pair (the release of TempSamp-R1). Of the others: the spans can be read.
    """
    if answer_form in ("text", "strict"):
        return [float(answers.is_whole(text)) for text in completions]
    has_block = lambda text: answer_form != "example" or bool(answer_text(text))
    return [float(has_block(text) and bool(read_spans(text, answer_form))) for text in completions]


def _is_think_then_answer(text: str) -> bool:
    lowered = text.lower()
    each_once = all(lowered.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return each_once and _THINK_THEN_ANSWER.fullmatch(text.strip()) is not None


def highlight_reward(
    completions: Sequence[str], *, samples: Sequence[Sample], require_tags: bool = True, **_: Any
) -> list[float]:
    """0.6 * F2 + 0.4 / (1 + WMSE) of the answered highlights; 0 where none parse.

    F2 weighs recall over precision (beta 2) of the exact 2-second timestamps. WMSE is the squared error of the saliency
    over the true clips, weighted by the squared true saliency; a true clip left out is predicted as 0.
    """
    return [
        _highlight_score(parse_highlights(text, require_tags), highlight_targets(sample))
        for text, sample in zip(completions, samples, strict=True)
    ]


def _highlight_score(predicted: Mapping[float, float] | None, targets: Mapping[float, float]) -> float:
    if not predicted or not targets:
        return 0.0
    num_matched = len(predicted.keys() & targets.keys())
    # F_beta = (1 + beta^2) * TP / (predicted + beta^2 * true), with beta = 2
    f2 = 5 * num_matched / (len(predicted) + 4 * len(targets))
    weight_sum = sum(target**2 for target in targets.values())
    wmse = sum(target**2 * (predicted.get(time, 0.0) - target) ** 2 for time, target in targets.items()) / weight_sum
    return 0.6 * f2 + 0.4 / (1 + wmse)


REWARDS: dict[str, Reward] = {
    "tiou": tiou_reward,
    "multi_tiou": multi_tiou_reward,
    "location": location_reward,
    "wasserstein": wasserstein_reward,
    "highlight": highlight_reward,
    "format": format_reward,
    "answer_format": answer_format_reward,
}

TASK_REWARDS: dict[Task, str] = {"grounding": "tiou", "multi_grounding": "multi_tiou", "highlight": "highlight"}
"""The reward of each task; think mode adds `format`."""

"""The forms of answers that others publish, each read as its own evaluation reads it; the paper's is in `rewards`.

A reader takes the whole answer and returns its spans in seconds in order, as written unless it says otherwise; None
where nothing can be read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tempsamp_fast.sample import Span

_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.IGNORECASE | re.DOTALL)
_NUMBER = r"(\d+(?:\.\d+)?)"
_FIRST = rf"(?<!\d){_NUMBER}"
"""Where a pattern begins: a run of digits is tried once, not from each of its digits."""
_CLOCK = re.compile(r"\b(?:(\d{1,2}):)?(\d{1,2}):(\d{2}(?:\.\d+)?)\b", re.ASCII)
_PAIRS = [re.compile(_FIRST + join + _NUMBER, re.ASCII) for join in (r"\.?\s*-\s*", r"\.?\s+to\s+")]
_WHOLE_ANSWER = re.compile(
    r"\s*(?:<think>(?:(?!</?think>|</?answer>).)*</think>\s*)?<answer>((?:(?!</?answer>).)*)</answer>\s*",
    re.DOTALL | re.IGNORECASE,
)
_WHOLE_PAIR = re.compile(rf"\s*{_NUMBER}\s*(?:to|and)\s*{_NUMBER}\s*", re.ASCII | re.IGNORECASE)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)
_LIST_START = re.compile(r"\[\s*\[")
_TIME_TAG = re.compile(r"<time>([^\s<>]{1,20}?)\s*-\s*([^\s<>]{1,20}?)\s*seconds?</time>", re.IGNORECASE)
_OMTG_TIME = r"(\d+(?::\d+(?:\.\d+)?)?(?:\.\d+)?)"
_SECONDS = re.compile(rf"(?<!\d){_OMTG_TIME}\s*-\s*{_OMTG_TIME}\s*seconds?", re.ASCII | re.IGNORECASE)
_OMTG_OTHERS = [
    re.compile(pattern, re.ASCII | re.IGNORECASE)
    for pattern in (
        rf"{_FIRST}\s+to\s+{_NUMBER}",
        rf"{_FIRST}\s*-\s*{_NUMBER}(?!\s*(?:seconds?|</time>))",
        rf"\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]",
        rf"starts\s+at\s+{_NUMBER}(?:\s+seconds?)?\s+and\s+ends\s+at\s+{_NUMBER}",
    )
]


def read_pairs(text: str) -> list[Span] | None:
    """TimeLens: clock times in pairs (MM:SS, HH:MM:SS), else every `a - b`, else every `a to b`, else all numbers in
    pairs; the first pair is the answer. No tags are looked for.
    """
    text = text.lower()
    clocks = [3600 * float(hours or 0) + 60 * float(m) + float(s) for hours, m, s in _CLOCK.findall(text)]
    if len(clocks) > 1:
        return _in_pairs(clocks)
    for pattern in _PAIRS:
        if found := pattern.findall(text):
            return [(float(start), float(end)) for start, end in found]
    numbers = re.findall(r"\b(?:\d+\.\d+|\d+)\b", text, re.ASCII)
    return _in_pairs([float(number) for number in numbers]) or None


def _in_pairs(times: list[float]) -> list[Span]:
    return list(zip(times[::2], times[1::2], strict=False))


def read_block_pairs(text: str) -> list[Span] | None:
    """OraRL's evaluation: `read_pairs` of the last answer block, of what follows its opening tag where that is never
    closed, of all without one.
    """
    blocks = _BLOCK.findall(text)
    opened = text.lower().rfind("<answer>")
    return read_pairs(blocks[-1] if blocks else text[opened + len("<answer>") :] if opened >= 0 else text)


def is_whole(text: str) -> bool:
    """Whether an answer is an optional think block and one answer block, and nothing else."""
    return _WHOLE_ANSWER.fullmatch(text) is not None


def read_strict(text: str) -> list[Span] | None:
    """OraRL's reward: the whole answer is an optional think block and one answer block, which holds `A to B` or
    `A and B` and nothing else; nothing is read where A is after B.
    """
    block = _WHOLE_ANSWER.fullmatch(text)
    pair = _WHOLE_PAIR.fullmatch(block[1]) if block else None
    if pair is None or float(pair[1]) > float(pair[2]):
        return None
    return [(float(pair[1]), float(pair[2]))]


def read_release(text: str) -> list[Span] | None:
    """The reward of TempSamp-R1's release: of the first answer block (of all without one) the last `A to B` or
    `A and B`, else the last `A - B`, else the first two numbers.
    """
    blocks = _BLOCK.findall(text)
    said = blocks[0] if blocks else text
    for join in (r"\s*(?:to|and)\s*", r"\s*-\s*"):
        if found := re.findall(_FIRST + join + _NUMBER, said, re.ASCII | re.IGNORECASE):
            return [(float(found[-1][0]), float(found[-1][1]))]
    numbers = [float(number) for number in re.findall(_FIRST, said, re.ASCII)[:2]]
    return _in_pairs(numbers) or None


def read_json(text: str) -> list[Span] | None:
    """TimeLens2: a JSON array `[[start, end], ...]` that is the whole answer, the inside of its answer tags or of a
    fenced block, or the first balanced `[[...]]`; a reversed pair is swapped. An empty array is an empty list.
    """
    text = text.rpartition("</think>")[2]
    for candidate in _json_texts(text):
        spans = _json_spans(candidate)
        if spans is not None:
            return spans
    return None


def _json_texts(text: str) -> Iterator[str]:
    yield text
    blocks = _BLOCK.findall(text)
    yield from blocks[-1:]
    yield from _FENCE.findall(text)[:1]
    start = _LIST_START.search(text)
    if start:
        depth = 0
        for index in range(start.start(), len(text)):
            depth += (text[index] == "[") - (text[index] == "]")
            if depth == 0:
                yield text[start.start() : index + 1]
                return


def _json_spans(text: str) -> list[Span] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(map(_is_pair, found)):
        return None
    return [(float(min(pair)), float(max(pair))) for pair in found]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(time, (int, float)) and not isinstance(time, bool) and abs(time) < 1e12 for time in value)
    )


def read_time_tags(text: str) -> list[Span] | None:
    """OMTG: every `<time>a - b seconds</time>`, else every `a - b seconds`, else `a to b`, `a - b`, `[a, b]` and
    `starts at a and ends at b`, each once; those that end after their start, sorted.
    """
    for pattern in (_TIME_TAG, _SECONDS):
        if spans := _ordered(pattern.findall(text)):
            return sorted(spans, key=lambda span: span[0])
    return sorted(set(_ordered([pair for pattern in _OMTG_OTHERS for pair in pattern.findall(text)]))) or None


def _ordered(pairs: list[tuple[str, str]]) -> list[Span]:
    spans = [(_clock_seconds(start), _clock_seconds(end)) for start, end in pairs]
    return [(start, end) for start, end in spans if start is not None and end is not None and end > start]


def _clock_seconds(written: str) -> float | None:
    """Seconds, MM:SS or HH:MM:SS."""
    try:
        parts = [float(part) for part in written.split(":")]
    except ValueError:
        return None
    return sum(part * 60**place for place, part in enumerate(reversed(parts))) if len(parts) <= 3 else None

"""The times that a person reads in a text: what is unambiguous is read, anything else is left unread, none is guessed.

Read are seconds (`12.5`, `12,5`, `1,234.5`, `1.234,5`), MM:SS and HH:MM:SS (`1:02,500` as in subtitles), and minutes
and hours in words (`1 min 30 s`). Left unread are numbers with two readings (`1,234`, `1 234`), negative ones, those
glued to other text, bare ones beside a clock time or wherever the text counts in frames, per cent or other units, and
all where it counts from elsewhere or tells how long (`for 5 to 7 s`, `10 to 5 s before the end`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

CLOCK, COMPOUND = -1, -2
"""Units of times that say themselves how they count: `1:02`, and `1 min 2 s`."""

_CLOCK = re.compile(r"(?:(\d+):)??(\d+):([0-5]\d(?:[.,]\d+)?)", re.ASCII)
_NUMBER = re.compile(r"\d+(?:\.\d+)?|(?![1-9]\d{0,2},\d{3}$)\d+,\d+", re.ASCII)
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+\.\d+|\d{1,3}(?:\.\d{3})+,\d+", re.ASCII)

_DASH = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2796\ufe58\ufe63\uff0d\u207b\u208b"
_RUN = re.compile(r"\d(?:[\d.,:]*\d)?", re.ASCII)
_UNIT = re.compile(r"\s*(?:(s|secs?|seconds?)|(m|mins?|minutes?)|h|hrs?|hours?)(?![^\W\d_])", re.IGNORECASE)
_OTHER_UNIT = re.compile(
    r"[%‰٪％]|\b(?:per\s?cent|pct|frames?|fps|minus|negative)\b"
    r"|(?<!\d)(?<!\d\s)\b(?:minutes?|mins?|hours?)\b"
    r"|(?<=\d)\s*(?:ms|msecs?|milli\w+|days?|weeks?|months?|years?|times|clips?|degrees?|[cmk]?m|met(?:er|re)s?)\b"
    r"|(?<=\d)\s*(?:[ap]\.?m\b|o.?clock\b|[€$£¥]|[x×*]\s*\d)",
    re.IGNORECASE,
)
_NOT_SINCE_THE_START = re.compile(
    r"\b(?:from|before)\s+the\s+end\b|\bago\b"
    r"|\b(?:first|last|next|every|for|lasts|lasting)\s+(?:about\s+|around\s+)?(?=\d)",
    re.IGNORECASE,
)
"""How long something takes, and times that are counted from elsewhere."""
_NARROW = "\u00a0\u2007\u2009\u200a\u202f"
"""Spaces that part the digits of one number."""
# What may touch a time on either side, the joining words apart.
_LEFT = re.compile(r"(?:\A|[\s(\[{<>\"'“‘*`|~=≈;]|[^\W\d_][:,]|[)\]}][,:])\Z")
_RIGHT = re.compile(rf"\Z|[\s.,;:!?)\]}}<>\"'”’*`|~…]|(?:to|and)(?=\s|\d|\Z)|[{_DASH}](?=[\s\d]|\Z)", re.IGNORECASE)
_SIGN = re.compile(rf"(?:[{_DASH}]|minus|negative)\s*\Z", re.IGNORECASE)
_BULLET = re.compile(rf"\n[^\S\n]*[{_DASH}][^\S\n]+\Z")
_JOIN = re.compile(rf"\s*(?:to|and|-->)\s*|[^\S\n]+[{_DASH}][^\S\n]+|[{_DASH}][^\S\n]*", re.IGNORECASE)


@dataclass
class Time:
    """A number of a text, and what it means if that is sure."""

    start: int
    """Where it begins in the text, and where it ends, its unit included."""
    end: int
    seconds: float | None
    """As written, in seconds if it has a unit or is bare; None where it cannot be read."""
    unit: int
    """In seconds; 0: it is bare."""
    smallest_unit: int
    """The last one of `1 min 2 s`."""
    has_comma: bool


def read_times(text: str) -> list[Time]:
    """Every number of `text` in order, unread ones included."""
    times: list[Time] = []
    for run in _RUN.finditer(text):
        unit = _UNIT.match(text, run.end())
        size = 0 if unit is None else 1 if unit[1] else 60 if unit[2] else 3600
        seconds, kind = _value(run[0], size)
        time = Time(run.start(), unit.end() if unit else run.end(), seconds, kind, size, "," in run[0])
        behind = times[-1].end if times else 0
        gap = text[behind : time.start]
        if times and times[-1].smallest_unit > max(size, 1) and gap.strip().lower() in ("", "and", ","):
            _compound(times[-1], time, gap)
            continue
        if times and times[-1].unit == 0 and _splits_a_number(gap, run[0]):
            times[-1].seconds = time.seconds = None
        if not (times and _JOIN.fullmatch(gap)) and not _may_begin(text[max(behind - 1, 0) : time.start]):
            time.seconds = None
        times.append(time)
    counts_otherwise = _OTHER_UNIT.search(text) is not None
    is_elsewhere = _NOT_SINCE_THE_START.search(text) is not None
    for time in times:
        is_metres = time.unit == 60 and text[time.end - 1] in "mM" and not text[time.end - 2].isalpha()
        is_unsure = is_metres or is_elsewhere or (time.unit == 0 and counts_otherwise)
        if is_unsure or not _RIGHT.match(text, time.end):
            time.seconds = None
    _unread_chains(text, times)
    _unread_strays(text, times)
    return times


def joined(text: str, first: Time, second: Time) -> tuple[float, float] | None:
    """The pair that `first to second`, `first and second` or `first - second` names; None where it names none."""
    if first.seconds is None or second.seconds is None or not _JOIN.fullmatch(text[first.end : second.start]):
        return None
    start, end = first.seconds, second.seconds
    if first.unit == 0 and second.unit in (60, 3600):  # 1 to 2 minutes
        start *= second.unit
        return (start, end) if start < end else None
    units = {first.unit, second.unit}
    is_unsure = (0 in units and units - {0, 1}) or units == {CLOCK, 3600}  # 1:30 to 95, 1:30 to 2 hours
    return None if is_unsure else (start, end)


def _value(written: str, unit: int) -> tuple[float | None, int]:
    """What a number with a unit means, in seconds, and its unit from now on."""
    if clock := _CLOCK.fullmatch(written):
        hours, minutes, seconds = clock.groups()
        is_sure = (unit <= 60 and not hours) or (unit <= 1 and int(minutes) < 60)
        total = 3600 * float(hours or 0) + 60 * float(minutes) + float(seconds.replace(",", "."))
        return (total if is_sure and math.isfinite(total) else None), CLOCK
    if _NUMBER.fullmatch(written):
        value = float(written.replace(",", "."))
    elif _THOUSANDS.fullmatch(written):
        whole, fraction = re.split(r"[.,](?=\d+\Z)", written)
        value = float(re.sub("[.,]", "", whole) + "." + fraction)
    else:
        return None, unit
    value *= unit or 1
    return (value if math.isfinite(value) else None), unit


def _compound(larger: Time, smaller: Time, gap: str) -> None:
    """Take `30 s` into the `1 min` before it; unread with a comma between, without a unit, and where it is no less."""
    is_sure = "," not in gap and smaller.unit > 0 and (smaller.seconds or math.inf) < larger.smallest_unit
    larger.seconds = larger.seconds + (smaller.seconds or 0) if is_sure and larger.seconds is not None else None
    larger.end, larger.unit, larger.smallest_unit = smaller.end, COMPOUND, smaller.smallest_unit


def _may_begin(gap: str) -> bool:
    """Whether a time can stand behind this text, which is no joining word."""
    return bool(_BULLET.search(gap) or (_LEFT.search(gap) and not _SIGN.search(gap)))


def _splits_a_number(gap: str, following: str) -> bool:
    """`1 234`, `1'234`, `12/5`: both parts may be one number."""
    is_thousand = re.match(r"\d{3}(?!\d)", following) and gap.isspace() and "\n" not in gap
    return bool(is_thousand) or (len(gap) == 1 and gap not in _DASH and (gap in _NARROW or not gap.isspace()))


def _unread_chains(text: str, times: list[Time]) -> None:
    """`2026-11-28` is no span, and in `1 to 2,3 to 4` the comma may part two spans."""
    for before, time, after in zip(times, times[1:], times[2:], strict=False):
        gaps = text[before.end : time.start], text[time.end : after.start]
        if all(len(gap) == 1 and gap in _DASH for gap in gaps):
            before.seconds = time.seconds = after.seconds = None
        elif time.has_comma and all(_JOIN.fullmatch(gap) and gap.strip().lower() != "and" for gap in gaps):
            time.seconds = None


def _unread_strays(text: str, times: list[Time]) -> None:
    """`12, 5 to 17, 8`: a whole number beside a span may be the other half of a decimal."""
    is_joined = [bool(_JOIN.fullmatch(text[a.end : b.start])) for a, b in pairwise(times)]
    for index, (before, after) in enumerate(pairwise(times)):
        is_whole = text[before.start : before.end].isdigit() and text[after.start : after.end].isdigit()
        in_spans = any(is_joined[max(index - 1, 0) : index]), any(is_joined[index + 1 : index + 2])
        if is_whole and in_spans[0] != in_spans[1] and re.fullmatch(r",[^\S\n]*", text[before.end : after.start]):
            before.seconds = after.seconds = None

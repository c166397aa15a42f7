"""Text and JSON from others: every flaw is an error that names its place, and quotes no more than a line of it."""

from __future__ import annotations

import gzip
import io
import json
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tempsamp_fast.system.files import read_bytes

MAX_TEXT_BYTES = 2**30
"""Of a file, once unpacked: it must not fill the memory."""
MAX_VALUES = 2**24
"""Of a JSON text: an empty list of three characters takes a hundred bytes once it is read."""

_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxother, _REPR.maxlist, _REPR.maxlevel = 90, 90, 12, 3


def shown(value: Any) -> str:
    """The value for a message: its `repr`, of which a long one is cut."""
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of one compressed by gzip. Raises ValueError for any other."""
    content = read_bytes(path, MAX_TEXT_BYTES)
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise ValueError(f"{path}: holds more than {MAX_TEXT_BYTES} bytes of text")
        return content.decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a UTF-8 text file, nor a compressed one ({error})") from error


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Every line that is not blank, with its number from 1."""
    return ((number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip())


def json_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The objects of JSON lines, or of one JSON list: its place, its number from 1, itself."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = ((f"{path}: row {number}", number, row) for number, row in enumerate(parse_json(str(path), text), 1))
    else:
        lines = ((f"{path}: line {number}", number, line) for number, line in text_lines(path))
        rows = ((place, number, parse_json(place, line)) for place, number, line in lines)
    for place, number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{place}: expected an object, got {shown(json.dumps(row))}")
        yield place, number, row


def json_object(path: Path) -> dict[str, Any]:
    """The one object that the file is."""
    return typed(str(path), "content", parse_json(str(path), read_text(path)), dict)


def parse_json(place: str, text: str) -> Any:
    """What a JSON text holds. Raises ValueError naming `place`, also for a key that comes twice in one object."""
    if len(text) > MAX_VALUES and sum(map(text.count, "[{,")) > MAX_VALUES:
        raise ValueError(f"{place}: holds more than {MAX_VALUES} values")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: malformed JSON ({error})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        count = Counter(key for key, _ in pairs)
        twice = next(key for key in count if count[key] > 1)
        raise ValueError(f"the key {shown(twice)} comes twice in one object")
    return fields


def as_float(place: str, text: Any) -> float:
    """A number of a text file. Raises ValueError for anything else."""
    try:
        return float(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {shown(text)} is not a number") from error


def as_number(place: str, name: str, value: Any) -> float:
    """A number of a JSON text. Raises ValueError for anything else, and for one that is not finite."""
    largest = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -largest <= value <= largest:
        raise ValueError(f"{place}: {name} has {shown(value)}, expected a finite number")
    return float(value)


def typed(place: str, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """The value. Raises ValueError for one of another type."""
    if not isinstance(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        raise ValueError(f"{place}: {name} is {shown(value)}, expected a {expected}")
    return value


def get(place: str, fields: dict[str, Any], *names: str) -> Any:
    """The first of `names` that `fields` has. Raises ValueError where it has none."""
    for name in names:
        if name in fields:
            return fields[name]
    raise ValueError(f"{place}: no field {' or '.join(map(repr, names))}, only {shown(list(fields))}")

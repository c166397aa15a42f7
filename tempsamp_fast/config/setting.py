"""What a setting is made of: a default, a meaning, and a range whose error names the setting, value and rule."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any


def setting(default: Any, meaning: str, former_name: str | None = None) -> Any:
    """A field with what `--help` and docs/settings.md say of it, and the name that it had before, which still works."""
    return field(default=default, metadata={"help": meaning, "aliases": [f"--{former_name}"] if former_name else []})


def parse_range(name: str, text: str | None) -> tuple[float, float]:
    """Read `low:high`, both included; either may be left out. None is everything.

    Raises ValueError naming the setting `name` and the value.
    """
    if text is None:
        return -math.inf, math.inf
    low, separator, high = text.partition(":")
    try:
        ends = float(low or "-inf"), float(high or "inf")
    except ValueError:
        ends = math.nan, math.nan
    if not separator or not ends[0] <= ends[1]:
        raise ValueError(f"{name}={text!r}: must be low:high, such as 5:150 or :60")
    return ends


def require_texts(section: Any) -> None:
    """Refuse a setting of `section` that is an empty text."""
    for name, value in vars(section).items():
        require(not isinstance(value, str) or bool(value.strip()), name, value, "a name, or left out")


def require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {rule}")

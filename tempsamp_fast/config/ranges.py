"""What a setting must be: ranges, and the error that names the setting, its value and the rule."""

from __future__ import annotations

import math


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


def require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {rule}")

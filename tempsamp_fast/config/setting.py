"""What a setting is made of: a default, a meaning, and a range whose error names the setting, value and rule."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import field
from typing import Any, Literal, get_args, get_origin, get_type_hints


def setting(default: Any, meaning: str, former_name: str | None = None, *, unit: str = "", source: str = "") -> Any:
    """A field with what `--help` and docs/settings.md say of it, and the name that it had before, which still works.

    unit: of a number; a pure one (a share, a factor, a seed) has none. source: the paper or project that it is from.
    """
    help = meaning + (f" [{unit}]" if unit else "") + (f" ({source})" if source else "")
    return field(default=default, metadata={"help": help, "aliases": [f"--{former_name}"] if former_name else []})


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the choice that is most like `value`, or nothing."""
    alike = difflib.get_close_matches(value, [*choices], n=1)
    return f"; did you mean {alike[0]!r}?" if alike else ""


def choose_from(value: str, choices: Iterable[str]) -> str:
    """The end of an error: `choose from a, b, c`, and the one that was probably meant."""
    choices = [*choices]
    return f"choose from {', '.join(choices)}{did_you_mean(value, choices)}"


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


def require_types(section: Any) -> None:
    """Refuse a setting of `section` of another type or choice than its field's, an empty text, and NaN or infinity."""
    for name, type_ in get_type_hints(type(section)).items():
        is_choice = get_origin(type_) is Literal
        kinds = get_args(type_) if not is_choice and get_args(type_) else (type_,)
        value, rules = getattr(section, name), [_rule(kind) for kind in kinds]
        require(any(_fits(value, kind) for kind in kinds), name, value, " or ".join(rules))


def _rule(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return {str: "a name", int: "a whole number", float: "a finite number", bool: "true or false"}.get(kind, "left out")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is not str or bool(value.strip()))


def require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {rule}")

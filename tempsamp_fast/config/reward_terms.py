"""What answers are rewarded for: `mine.py:f=0.5,tiou=1` read into terms."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

SET_ELSEWHERE = {"format": "format_weight", "answer_format": "format_weight", "overlong": "soft_overlong"}
"""What is added to the sum by settings of its own."""
TERM = r"(?:(.+\.py):)?([A-Za-z]\w*)\s*(?:=(.+))?"


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a sum."""

    name: str
    """A function of `file`, or a name of `rewards.REWARDS`; records carry it."""
    weight: float = 1.0
    """0: recorded, not learned."""
    file: str = ""


@cache
def parse_rewards(text: str | None) -> tuple[RewardTerm, ...]:
    """Read `[file.py:]name[=weight]` entries separated by commas; None is the task's own reward, no terms here.

    Raises ValueError naming the entry.
    """
    terms: list[RewardTerm] = []
    for entry in text.split(",") if text is not None else ():
        match = re.fullmatch(TERM, entry.strip())
        try:
            weight = float((match and match[3]) or 1)
        except ValueError:
            weight = math.nan
        if not match or not math.isfinite(weight):
            raise ValueError(f"rewards: {entry.strip()!r} is not [file.py:]name[=weight], such as mine.py:brief=0.5")
        if match[2] in SET_ELSEWHERE:
            raise ValueError(f"rewards: {entry.strip()!r} is set by --{SET_ELSEWHERE[match[2]]}")
        if match[2] in [term.name for term in terms]:
            raise ValueError(f"rewards: {match[2]!r} comes twice")
        terms.append(RewardTerm(match[2], weight, match[1] or ""))
    return tuple(terms)


def weighted(rewards: Mapping[str, float], text: str | None) -> float:
    """The sum of an answer's rewards by the weights of the setting `rewards`; what it does not name counts once."""
    weights = {term.name: term.weight for term in parse_rewards(text)}
    return sum(weights.get(name, 1.0) * value for name, value in rewards.items())

"""The answers to a prompt as a person reads them: some of each step in groups.jsonl, a few on the console."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.config.reward_terms import weighted
from tempsamp_fast.data.text_files import shown
from tempsamp_fast.system.files import one_line

MOST_CHARACTERS = 1000
"""Of an answer in the record."""
MOST_SHOWN = 4
"""Answers on the console."""


def sampled_groups(groups: Sequence[RolloutGroup], step: int, number: int) -> list[RolloutGroup]:
    """`number` of the groups, others in every step."""
    number = min(number, len(groups))
    return [groups[(step * number + index) % len(groups)] for index in range(number)]


def texts_of(group: RolloutGroup) -> dict[str, Any]:
    """What was asked and answered, for a line of groups.jsonl."""
    sample = group.prompt.sample
    texts = [answer.text[:MOST_CHARACTERS] for answer in group.completions]
    return {"sample_id": sample.sample_id, "mode": group.prompt.mode, "query": sample.query, "texts": texts}


def lines_of(group: RolloutGroup, rewards: str | None, width: int) -> list[str]:
    """The query and the first answers with their rewards (summed by the setting `rewards`), a line each.

    width: of a line, in columns of a terminal. Of a long answer its end is shown, where the spans are.
    """
    spans = ", ".join(f"{start:.2f} to {end:.2f} s" for start, end in group.prompt.sample.windows)
    asked = f"  {shown(group.prompt.sample.query)}, {group.prompt.mode}: {spans}"
    lines = [asked[: _num_fitting(asked, width)]]
    for answer in group.completions[:MOST_SHOWN]:
        head = f"  {weighted(answer.rewards, rewards):6.3f} {'true' if answer.is_off_policy else '    '} "
        text, room = one_line(answer.text), width - len(head)
        if _num_fitting(text, room) < len(text):
            text = "..." + text[len(text) - _num_fitting(reversed(text), room - 3) :]
        lines.append(head + text)
    if len(group.completions) > MOST_SHOWN:
        lines.append(f"  and {len(group.completions) - MOST_SHOWN} more")
    return lines


def _num_fitting(letters: Iterable[str], room: int) -> int:
    """How many of the letters fit into so many columns: those of East Asia take two, accents that are added none."""
    columns = (
        2 if unicodedata.east_asian_width(each) in "WF" else int(not unicodedata.combining(each)) for each in letters
    )
    return sum(end <= room for end in itertools.accumulate(columns))

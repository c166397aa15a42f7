"""The answers to a prompt as a person reads them: some of each step in groups.jsonl, a few on the console."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The query and the first answers with their rewards (summed by the setting `rewards`), a line of `width` each.

    Of a long answer its end is shown, where the spans are.
    """
    spans = ", ".join(f"{start:.2f} to {end:.2f} s" for start, end in group.prompt.sample.windows)
    lines = [f"  {shown(group.prompt.sample.query)}, {group.prompt.mode}: {spans}"[:width]]
    for answer in group.completions[:MOST_SHOWN]:
        head = f"  {weighted(answer.rewards, rewards):6.3f} {'true' if answer.is_off_policy else '    '} "
        text, room = one_line(answer.text), width - len(head)
        lines.append(head + (text if len(text) <= room else "..." + text[3 - room :]))
    if len(group.completions) > MOST_SHOWN:
        lines.append(f"  and {len(group.completions) - MOST_SHOWN} more")
    return lines

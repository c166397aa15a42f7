"""Answers as a person reads them: which are kept, how long they are, and what a terminal gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, VideoPatches
from tempsamp_fast.run.answers import MOST_CHARACTERS, MOST_SHOWN, lines_of, sampled_groups, texts_of
from tempsamp_fast.sample import Sample

VIDEO = VideoPatches(torch.empty(0), (1, 2, 2), 1.0, torch.zeros(1))


def group(*texts: str, query: str = "a square") -> RolloutGroup:
    sample = Sample("clip/0", Path("clip.mp4"), query, 12.0, ((2.0, 6.0),))
    answers = [Completion(torch.zeros(1), text, index == 1, rewards={"tiou": 0.5}) for index, text in enumerate(texts)]
    return RolloutGroup(Prompt(sample, "answer", torch.zeros(1), VIDEO), answers)


def test_other_groups_are_kept_in_every_step() -> None:
    groups = [group(str(index)) for index in range(3)]
    kept = [[each.completions[0].text for each in sampled_groups(groups, step, 2)] for step in range(3)]
    assert kept == [["0", "1"], ["2", "0"], ["1", "2"]]
    assert len(sampled_groups(groups, 5, 9)) == 3 and sampled_groups([], 5, 2) == sampled_groups(groups, 5, 0) == []


def test_the_record_is_bounded() -> None:
    row = texts_of(group("x" * 5000, "short"))
    assert [len(text) for text in row["texts"]] == [MOST_CHARACTERS, 5]
    assert (row["sample_id"], row["mode"], row["query"]) == ("clip/0", "answer", "a square")


@pytest.mark.parametrize("width", [80, 120])
def test_every_line_fits_and_ends_with_the_end_of_the_answer(width: int) -> None:
    texts = ["long " * 90 + "<answer> 1 to 2 </answer>", "\x1b[31mred\n", *["short"] * 5]
    lines = lines_of(group(*texts, query="\x1b[2J" + "q" * 500), "tiou=2", width)
    assert max(map(len, lines)) <= width and len(lines) == 2 + MOST_SHOWN
    assert lines[1].startswith("   1.000      ...") and lines[1].endswith("<answer> 1 to 2 </answer>")
    assert lines[2] == "   1.000 true \\x1b[31mred"
    assert lines[-1] == f"  and {len(texts) - MOST_SHOWN} more" and "\x1b" not in "".join(lines)


def test_letters_of_two_columns_and_of_none_are_counted_so() -> None:
    query = "\u4eba\u6253\u5f00\u51b0\u7bb1" * 9
    texts = ["\u7b2c" * 100 + "<answer> 1 to 2 </answer>", "\u7b2c" * 31, "e\u0301" * 62]
    lines = lines_of(group(*texts, query=query), None, 80)
    wide = [sum(2 if letter > "\u4e00" else letter != "\u0301" for letter in line) for line in lines]
    assert max(wide) <= 80 and min(wide) >= 75
    assert lines[1].endswith("<answer> 1 to 2 </answer>") and lines[2].endswith(texts[1]) and "..." not in lines[3]

"""The answer forms of others: what each reader takes, and that what is written in a form reads back."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.answers import read_block_pairs, read_json, read_pairs, read_release, read_strict, read_time_tags
from tempsamp_fast.data.prompts import QUESTION_FORMS, off_policy_text, question
from tempsamp_fast.rewards import READERS, answered_span, multi_tiou_reward, read_spans, tiou_reward
from tempsamp_fast.sample import AnswerForm, Sample

FORMS = get_args(AnswerForm)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("The event happens in 12.54 - 17.83 seconds", [(12.54, 17.83)]),
        ("from 4.4 to 4.49, or 5 to 6", [(4.4, 4.49), (5, 6)]),
        ("5 to 6, no, 7 - 8", [(7, 8)]),
        ("from 00:12 until 01:02:03.5, 9 - 10", [(12, 3723.5)]),
        ("starts at 0:05 and ends 12.5", [(0, 5)]),
        ("2. - 3", [(2, 3)]),
        ("It starts after 3 s, ends after 4.5 s and 7", [(3, 4.5)]),
        ("<answer> 1 to 2 </answer>", [(1, 2)]),
        ("at 3", None),
        ("", None),
    ],
)
def test_timelens_reads_the_first_pair_of_the_first_pattern_that_is_there(text, spans):
    assert read_pairs(text) == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("9 to 10 <answer>1 to 2</answer>", [(1, 2)]),
        ("<answer>1 to 2</answer> <answer>3 - 4</answer>", [(3, 4)]),
        ("7 - 8 <answer>1 to 2", [(1, 2)]),
        ("7 - 8", [(7, 8)]),
        ("7 - 8 <answer></answer>", None),
    ],
)
def test_orarl_evaluates_the_last_answer_block(text, spans):
    assert read_block_pairs(text) == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<answer>12 to 18</answer>", [(12, 18)]),
        ("<think> 1 to 2 </think>\n<answer> 12.5 and 18 </answer>", [(12.5, 18)]),
        ("<answer>18 to 18</answer>", [(18, 18)]),
        ("<answer>18 to 12</answer>", None),
        ("<answer>12 - 18</answer>", None),
        ("<answer>12 to 18 s</answer>", None),
        ("so <answer>12 to 18</answer>", None),
        ("<answer>1 to 2</answer><answer>12 to 18</answer>", None),
    ],
)
def test_orarl_rewards_a_whole_answer_only(text, spans):
    assert read_strict(text) == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<answer>1 to 2, 3 and 4</answer><answer>5 to 6</answer>", [(3, 4)]),
        ("<answer>1 - 2, 3 - 4</answer>", [(3, 4)]),
        ("<answer>1, 2, 3</answer>", [(1, 2)]),
        ("from 1 to 2", [(1, 2)]),
        ("<answer>3</answer>", None),
    ],
)
def test_the_release_rewards_the_first_answer_block(text, spans):
    assert read_release(text) == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[[0, 3.5], [10, 12]]", [(0, 3.5), (10, 12)]),
        ("<think>[[1, 2]]</think> <answer>\n[[12, 3.5]]\n</answer>", [(3.5, 12)]),
        ("<think> Not [[1, 2]]. </think> [[12, 3.5]]", [(3.5, 12)]),
        ("So: ```json\n[[1, 2]]\n``` or [[3, 4]]", [(1, 2)]),
        ("It is [[1, 2], [3, 4]], I think [[5, 6]]", [(1, 2), (3, 4)]),
        ("<answer>[[1, 2]]</answer> no, <answer>[[3, 4]]</answer>", [(3, 4)]),
        ("[]", []),
        ("[1, 2]", None),
        ("[[1, 2, 3]]", None),
        ("[[true, 2]]", None),
        ("[[1, 1e999]]", None),
        ("[[1, 2]", None),
        ("[" * 100_000, None),
        ("1 to 2", None),
    ],
)
def test_json_lists_are_read_wherever_they_stand(text, spans):
    assert read_json(text) == spans


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<time>50 - 60 seconds</time> and <time>0:02 - 10.5 seconds</time>, 7 - 8 seconds", [(2, 10.5), (50, 60)]),
        ("<time>9 - 3 seconds</time> 7 - 8 seconds, 1:00 - 2:00 second", [(7, 8), (60, 120)]),
        ("from 5 to 7, [1, 3], 5 to 7", [(1, 3), (5, 7)]),
        ("<time>0:01:05 - 1:00:10 seconds</time>", [(65, 3610)]),
        ("starts at 3 seconds and ends at 4.5 seconds", [(3, 4.5)]),
        ("<time>1:2:3:4 - x seconds</time>", None),
        ("never", None),
    ],
)
def test_omtg_reads_every_span_in_order(text, spans):
    assert read_time_tags(text) == spans


TIMES = st.floats(0, 200_000).map(lambda time: round(time, 2))


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.tuples(TIMES, st.floats(0.05, 50)), min_size=1, max_size=3))
def test_what_is_written_in_a_form_reads_back_and_earns_the_most(form, starts):
    windows = tuple((start, round(start + length, 2)) for start, length in starts)
    sample = Sample("s", Path("v.mp4"), "query", 300_000.0, windows)
    text = off_policy_text(sample, "answer", answer_form=form)
    span = answered_span(text, form)
    expected = min(windows, key=lambda window: window[0]) if form == "time_tags" else windows[0]
    assert span == expected
    assert tiou_reward([text], samples=[sample], answer_form=form) == [1.0]
    if QUESTION_FORMS[form].names_all:
        assert sorted(read_spans(text, form)) == sorted(windows)
        assert multi_tiou_reward([text], samples=[sample], answer_form=form) == [1.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_asks_for_itself_and_only_for_tasks_and_modes_that_it_knows(form):
    asked = question("A  man.", "answer", answer_form=form)
    assert {"text": "a  man", "example": "a  man", "time_tags": "A  man."}.get(form, "A man") in asked
    assert ("<answer>" in asked) == QUESTION_FORMS[form].thinks
    if form != "text":
        with pytest.raises(ValueError, match=f"answer_form='{form}' cannot ask for the task highlight"):
            question("a man", "answer", "highlight", form)
    if not QUESTION_FORMS[form].thinks:
        with pytest.raises(ValueError, match="has no thoughts: choose the mode answer"):
            question("a man", "think", answer_form=form)


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("unit", ["1", "1 ", "1-", "[", "<answer>", "<time>1 ", "- ", "1:", "```", "1 to ", "<think>"])
def test_no_answer_takes_long_to_read(form, unit):
    """Quadratic patterns would take minutes."""
    read_spans(unit * 20_000, form)


def test_times_that_are_no_numbers_are_not_read():
    assert answered_span("1" * 400 + " - " + "2" * 400, "sentence") is None

"""The answer parser, which training and evaluation share."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.rewards import parse_highlights, parse_span, parse_spans


@pytest.mark.parametrize(
    "text, span",
    [
        ("<answer> 12.54 to 17.83 </answer>", (12.54, 17.83)),
        ("<ANSWER>12 and 17</Answer>", (12, 17)),
        ("<answer>12.5 - 17</answer>", (12.5, 17)),
        ("<answer>12.5s to 17.25 seconds.</answer>", (12.5, 17.25)),
        ("<answer>from 1:02 to 01:01:03.5</answer>", (62, 3663.5)),
        ("<answer>1 to 2</answer> no, <answer>3 to 4</answer>", (3, 4)),
        ("<answer>1 to 2, or rather 3 to 4</answer>", (3, 4)),
        ("<answer> 1 to 2 <answer> 3 to 4 </answer>", (3, 4)),
        ("<answer>5 and 12 to 20</answer>", (12, 20)),
        ("<answer>1 to 2 and 3 to 4</answer>", (3, 4)),
        ("<answer>1 to 2, 5 and 0:12 - 20 s</answer>", (12, 20)),
        ("<answer>\n0.123456789 to 0.2\n</answer>", (0.123456789, 0.2)),
        ("<answer>9 to 5</answer>", (9, 5)),
        ("<answer>1 to 2</answer> <answer>soon</answer>", None),
        ("<answer>12.54</answer>", None),
        ("<answer>-5 to 13</answer>", None),
        ("<answer>1.2.3 to 4</answer>", None),
        ("<answer>1 to 2.3.4</answer>", None),
        ("<answer>1 to 01:75</answer>", None),
        ("<answer>nan to inf</answer>", None),
        (f"<answer>1 to {'9' * 400}</answer>", None),
        ("12.54 to 17.83", None),
        ("", None),
    ],
)
def test_last_pair_of_the_last_answer_block(text, span):
    assert parse_span(text) == span


def test_tags_can_be_optional():
    assert parse_span("from 1 to 2 seconds", require_tags=False) == (1, 2)
    assert parse_span("3 to 4 <answer>1 to 2</answer>", require_tags=False) == (1, 2)


def test_every_pair_is_read_in_order():
    assert parse_spans("9 to 10 <answer>1 to 2, 3.5 to 4; 0:05 - 0:07</answer>") == [(1, 2), (3.5, 4), (5, 7)]


@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=9),
    st.lists(st.sampled_from([" to ", " and ", " - ", "; ", " s to ", " seconds. "]), min_size=8, max_size=8),
)
def test_the_last_two_neighbours_that_are_joined_are_the_span(times, separators):
    """And the spans of an answer share no time."""
    text = str(times[0]) + "".join(f"{word}{time}" for word, time in zip(separators, times[1:], strict=False))
    joined = [i for i in range(len(times) - 1) if separators[i].strip() in ("to", "and", "-", "s to")]
    expected = (times[joined[-1]], times[joined[-1] + 1]) if joined else None
    assert parse_span(f"<answer>{text}</answer>") == expected
    spans = parse_spans(f"<answer>{text}</answer>")
    assert len(spans) * 2 <= len(times) and len(spans) >= len(joined) / 2


WORDS = [
    "<answer>",
    "</answer>",
    "timestamps",
    "saliency scores",
    " to ",
    " and ",
    "-",
    " ",
    "\n",
    "s",
    ".",
    ":",
    ", ",
    "é",
]


@given(st.lists(st.sampled_from([*WORDS, *"0159", "9" * 400]), max_size=40).map("".join))
def test_no_text_is_an_error_and_what_is_read_are_times(text):
    """Finite and from 0 on; the span is the last of the spans; highlights are read where both their words stand."""
    for whole in (text, f"<answer>{text}</answer>"):
        spans = parse_spans(whole)
        assert all(0 <= time < math.inf for span in spans for time in span)
        assert parse_span(whole) == (spans[-1] if spans else None)
        highlights = parse_highlights(whole)
        assert highlights is None or ("timestamps" in whole and "saliency scores" in whole)
        assert all(number >= 0 for pair in (highlights or {}).items() for number in pair)
    if "answer>" not in text:
        assert parse_spans(text) == [] and parse_spans(f"<answer>{text}</answer>") == parse_spans(text, False)


def test_a_long_run_of_digits_spaces_or_tags_takes_no_long_time():
    started_s = time.process_time()
    assert parse_span("<answer>1" + " " * 100_000 + "</answer>") is None
    assert parse_span("<answer>" + "1" * 100_000 + "</answer>") is None
    assert parse_span("<answer>" * 20_000) is None
    assert time.process_time() - started_s < 5


@pytest.mark.parametrize(
    "answer, highlights",
    [
        (
            "The highlight timestamps are in the 82, 84 seconds. Their saliency scores are 1.3, 1.7.",
            {82.0: 1.3, 84.0: 1.7},
        ),
        ("the highlight TIMESTAMPS: 82 84. Saliency Scores: 1 2", {82.0: 1.0, 84.0: 2.0}),
        ("timestamps 82, 84, 86. saliency scores are 1.3", {82.0: 1.3}),
        ("timestamps 82, 82. saliency scores are 1.3, 4", {82.0: 1.3}),
        ("timestamps. saliency scores", {}),
        ("82, 84 and 1.3, 1.7", None),
    ],
)
def test_highlights(answer, highlights):
    assert parse_highlights(f"<answer> {answer} </answer>") == highlights
    assert parse_highlights(answer) is None

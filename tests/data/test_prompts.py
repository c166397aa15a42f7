"""Questions and the answer texts made from the ground truth."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tempsamp_fast.data.prompts import collapse_query, normalise_query, off_policy_text, question, span_text
from tempsamp_fast.rewards import format_reward, parse_spans
from tempsamp_fast.sample import Sample

SAMPLE = Sample("s", Path("v.mp4"), "Query", 20.0, ((12.54, 17.83), (18.0, 22.5)))


def test_answer_text_is_the_papers():
    assert off_policy_text(SAMPLE, "answer") == "<answer> 12.54 to 17.83 </answer>"


def test_think_text_names_the_span_and_earns_the_format_reward():
    text = off_policy_text(SAMPLE, "think")
    assert text.startswith("<think>") and "<timestep> 12.54 to 17.83 </timestep>" in text
    assert text.endswith("</think> " + off_policy_text(SAMPLE, "answer"))
    assert format_reward([text]) == [1.0]


def test_cot_off_policy_options_change_only_think_mode():
    answer = off_policy_text(SAMPLE, "answer")
    assert off_policy_text(SAMPLE, "think", "answer_only") == answer
    assert off_policy_text(SAMPLE, "think", "skip") is None
    assert off_policy_text(SAMPLE, "answer", "skip") == answer


def test_unknown_cot_off_policy_lists_the_choices():
    with pytest.raises(ValueError, match="cot_off_policy 'none': choose from template, answer_only, skip"):
        off_policy_text(SAMPLE, "think", "none")


def test_a_late_end_is_clipped_to_the_video():
    text = off_policy_text(SAMPLE, "answer", task="multi_grounding")
    assert parse_spans(text) == [(12.54, 17.83), (18.0, 20.0)]


@pytest.mark.parametrize("raw", ["A Person sits", " a person SITS. ", "a person sits .", "a person sits..\n"])
def test_queries_that_differ_in_case_and_full_stops_are_asked_alike(raw):
    assert normalise_query(raw) == "a person sits"
    assert question(raw, "answer") == question("a person sits", "answer")


@pytest.mark.parametrize("raw", ["A Man sits", " A  Man\nsits. ", "...A Man sits ."])
def test_other_forms_ask_without_full_stops_and_keep_the_case(raw):
    assert collapse_query(raw) == "A Man sits"
    assert question(raw, "answer", answer_form="sentence") == question("A Man sits", "answer", answer_form="sentence")


def test_a_query_with_braces_is_asked_literally():
    assert "{0} {query}" in question("{0} {query}", "answer")


@pytest.mark.parametrize("task", ["grounding", "multi_grounding", "highlight"])
def test_both_modes_ask_for_the_answer_tags_and_only_think_for_reasoning(task):
    answer, think = (question("a person sits", mode, task) for mode in ("answer", "think"))
    assert "<answer>" in answer and "<think>" not in answer
    assert all(tag in think for tag in ("<answer>", "<think>", "<timestep>"))


TIMES = st.floats(0, 1e5, allow_subnormal=False)


@given(TIMES, TIMES, TIMES)
@example(9.298, 14.3, 9.3)
@example(9.3, 14.3, 9.304)
@example(0.0, 0.001, 0.012)
@example(3.0, 3.001, 10.0)
@example(9.999, 10.0, 10.0)
@example(0.0, 5.0, 0.0099999)
def test_a_span_is_written_inside_the_video_and_never_empty(start, end, duration_s):
    """Within a hundredth of what it is; it is None only where no two decimals name a span of the video."""
    said = span_text((start, end), duration_s)
    if said is None:
        assert duration_s < 0.01
        return
    first, last = map(float, said.split(" to "))
    assert 0 <= first < last <= duration_s + 1e-6
    assert abs(first - min(start, duration_s)) <= 0.0200001 and last >= min(end, duration_s) - 0.0100001


@pytest.mark.parametrize("mode", ["answer", "think"])
def test_no_off_policy_text_holds_an_empty_span_or_list(mode):
    short = Sample("s", Path("v.mp4"), "Query", 0.004, ((0.0, 0.003),))
    assert [off_policy_text(short, mode, task=task) for task in ("grounding", "multi_grounding", "highlight")] == [
        None
    ] * 3
    assert off_policy_text(SAMPLE, mode, task="highlight") is None
    zeros = Sample("s", Path("v.mp4"), "Query", 20.0, ((0.0, 3.0),), {0: (0, 0, 0)})
    assert off_policy_text(zeros, mode, task="highlight") is None
    edge = Sample("s", Path("v.mp4"), "Query", 9.3, ((9.298, 14.3),))
    assert parse_spans(off_policy_text(edge, mode)) == [(9.29, 9.3)]

"""Questions and the answer texts made from the ground truth."""

from pathlib import Path

import pytest

from tempsamp_fast.data.prompts import normalise_query, off_policy_text, question
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


def test_a_query_with_braces_is_asked_literally():
    assert "{0} {query}" in question("{0} {query}", "answer")


@pytest.mark.parametrize("task", ["grounding", "multi_grounding", "highlight"])
def test_both_modes_ask_for_the_answer_tags_and_only_think_for_reasoning(task):
    answer, think = (question("a person sits", mode, task) for mode in ("answer", "think"))
    assert "<answer>" in answer and "<think>" not in answer
    assert all(tag in think for tag in ("<answer>", "<think>", "<timestep>"))

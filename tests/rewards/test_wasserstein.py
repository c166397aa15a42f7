"""TimeLens2's reward and the shapes of rewards around it: the published numbers, and what cannot be read."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.rewards import answer_format_reward, location_reward, soft_overlong, wasserstein_reward
from tempsamp_fast.sample import Sample

ONE, TWO = ((10.0, 20.0),), ((0.0, 10.0), (50.0, 60.0))


def truth(windows) -> Sample:
    return Sample("s", Path("v.mp4"), "query", 100.0, windows)


def said(spans, form="text") -> str:
    if form == "json":
        return f"<think> [1, 2] </think> <answer>{[list(span) for span in spans]}</answer>"
    return f"<answer> {', '.join(f'{start} to {end}' for start, end in spans)} </answer>"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("windows", "spans", "distance", "reward", "iou"),
    [
        (ONE, [(10, 20)], 0, 1, 1),
        (ONE, [(12, 22)], 2, 0.8187, 0.6667),
        (ONE, [(30, 40)], 20, 0.1353, 0),
        (ONE, [(0, 100)], 36.1111, 0.0270, 0.1),
        (ONE, [(14, 16)], 2, 0.8187, 0.2),
        (ONE, [(12, 18)], 1, 0.9048, 0.6),
        (TWO, [(0, 10)], 25, 0.2865, 0.5),
        (TWO, [(0, 5), (5, 10), (52, 60)], 2.7284, 0.8725, 0.9),
        (TWO, [(20, 30)], 22.5, 0.3247, 0),
    ],
)
def test_the_published_numbers(windows, spans, distance, reward, iou, form):
    texts, samples = [said(spans, form)], [truth(windows)]
    (alone,) = wasserstein_reward(texts, samples=samples, with_iou=False)
    assert alone == pytest.approx(reward, abs=6e-5)
    assert -math.log(alone) * sum(end - start for start, end in windows) == pytest.approx(distance, abs=6e-5)
    (whole,) = wasserstein_reward(texts, samples=samples)
    assert whole - alone == pytest.approx(iou, abs=6e-5)


def test_the_published_number_of_the_location_reward():
    sample = Sample("s", Path("v.mp4"), "query", 30.0, (*ONE, (25.0, 26.0)))
    texts = [said([(12, 22)]), said([(10, 20)]), "no idea", said([(100, 200)])]
    assert location_reward(texts, samples=[sample] * 4) == pytest.approx([0.5807, 1, 0, 0], abs=6e-5)


def test_each_end_that_is_off_costs_its_own_share_of_the_video():
    """9 to 26 for 10 to 20 of 30 s: an IoU of 10 / 17, 1 s off at the start and 6 s at the end."""
    (value,) = location_reward([said([(9, 26)])], samples=[Sample("s", Path("v.mp4"), "query", 30.0, ONE)])
    assert value == pytest.approx(10 / 17 * (29 / 30) * (24 / 30))


@pytest.mark.parametrize(("reward", "most", "least"), [(location_reward, 1.0, 0.0), (wasserstein_reward, 2.0, -1.0)])
def test_answers_are_read_in_their_form_and_without_tags_where_allowed(reward, most, least):
    earned = lambda text, **how: reward([text], samples=[truth(ONE)], **how)
    assert earned("10 to 20") == [least] and earned("10 to 20", require_tags=False) == [most]
    assert earned("in 10 - 20 seconds", answer_form="sentence") == [most]


def test_a_larger_beta_punishes_distance_more():
    (value,) = wasserstein_reward([said([(12, 22)])], samples=[truth(ONE)], beta=3.0, with_iou=False)
    assert value == pytest.approx(0.5488, abs=6e-5)


def test_distance_is_told_in_lengths_of_what_the_true_spans_cover():
    """0 to 15 in all, of which 20 to 30 is 17.5 s away."""
    overlapping = truth(((0.0, 10.0), (5.0, 15.0)))
    (value,) = wasserstein_reward([said([(20, 30)])], samples=[overlapping], with_iou=False)
    assert value == pytest.approx(math.exp(-17.5 / 15))


def test_an_answer_that_cannot_be_read_costs_and_an_empty_one_earns_nothing():
    texts = ["no idea", "<answer>[]</answer>", said([(5, 5), (10, 20)], "json"), said([(20, 10)], "json")]
    assert wasserstein_reward(texts, samples=[truth(ONE)] * 4) == [-1.0, 0.0, 0.0, 2.0]
    assert wasserstein_reward(texts[:1], samples=[truth(ONE)], parse_penalty=0.5) == [-0.5]
    assert wasserstein_reward(["[]"], samples=[truth(())]) == [2.0]
    assert wasserstein_reward(["[]"], samples=[truth(())], with_iou=False) == [1.0]
    assert wasserstein_reward([said([(1, 2)])], samples=[truth(())]) == [0.0]
    assert wasserstein_reward([said([(10, 20)])], samples=[truth(ONE)], answer_form="json") == [-1.0]


@given(st.integers(0, 60), st.integers(1, 30))
def test_an_answer_that_misses_earns_the_more_the_nearer_it_is(start, width):
    near, far = (
        wasserstein_reward([said([(at, at + width)])], samples=[truth(ONE)])[0] for at in (start + 20, start + 21)
    )
    assert 0 < far < near < 1


@pytest.mark.parametrize(("num_tokens", "penalty"), [(1, 0), (80, 0), (90, -0.5), (100, -1), (101, -1), (81, -0.05)])
def test_overlong_answers_lose_up_to_one(num_tokens, penalty):
    assert soft_overlong(num_tokens, 100, 20) == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("form", "text", "value"),
    [
        ("strict", "<answer>1 to 2</answer>", 1),
        ("strict", "<think> so </think>\n<answer>no</answer> ", 1),
        ("strict", "<answer>1 to 2</answer> <answer>1 to 2</answer>", 0),
        ("text", "It is <answer> 1 to 2 </answer>", 0),
        ("text", "<answer> 1 to 2 </answer>", 1),
        ("example", "It is <answer> 1 to 2 </answer>", 1),
        ("example", "1 to 2", 0),
        ("example", "<answer> later </answer>", 0),
        ("json", "[[1, 2]]", 1),
        ("json", "<answer>1 to 2</answer>", 0),
        ("sentence", "The event happens in 1 - 2 seconds.", 1),
        ("time_tags", "<time>2 - 1 seconds</time>", 0),
    ],
)
def test_the_form_asked_for_without_thoughts(form, text, value):
    assert answer_format_reward([text], answer_form=form) == [value]

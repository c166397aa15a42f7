"""Rewards: their values on worked examples and their laws."""

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.rewards import (
    REWARDS,
    TASK_REWARDS,
    format_reward,
    highlight_reward,
    highlight_targets,
    multi_segment_iou,
    multi_tiou_reward,
    temporal_iou,
    tiou_reward,
)
from tempsamp_fast.sample import Sample, Task

TASK_VALUES = {"grounding": [1, 1, 0], "multi_grounding": [0.5, 1, 0], "highlight": [0, 0, 1]}


def sample(*windows, duration_s=30.0, clip_scores=None):
    return Sample("s", Path("v.mp4"), "a query", duration_s, windows or ((5.0, 10.0),), clip_scores or {})


times = st.integers(min_value=0, max_value=100_000).map(lambda hundredths: hundredths / 100)
spans = st.tuples(times, times).filter(lambda span: span[0] < span[1])
clip_scores = st.dictionaries(
    st.integers(0, 74), st.lists(st.integers(0, 4), min_size=3, max_size=3).map(tuple), min_size=1
)


@pytest.mark.parametrize(
    "a, b, iou",
    [
        ((0, 10), (0, 10), 1),
        ((0, 10), (5, 15), 1 / 3),
        ((0, 10), (2, 4), 0.2),
        ((0, 10), (10, 20), 0),
        ((0, 10), (12, 20), 0),
        ((10, 0), (0, 10), 0),
        ((3, 3), (3, 3), 0),
    ],
)
def test_temporal_iou(a, b, iou):
    assert temporal_iou(a, b) == pytest.approx(iou)


@given(spans, spans)
def test_temporal_iou_is_symmetric_and_that_of_one_segment(a, b):
    assert temporal_iou(a, b) == temporal_iou(b, a) == pytest.approx(multi_segment_iou([a], [b]))
    assert 0 <= temporal_iou(a, b) <= 1


@pytest.mark.parametrize(
    "a, b, iou",
    [
        ([(0, 2), (4, 6)], [(0, 6)], 4 / 6),
        ([(0, 4), (2, 6)], [(0, 6)], 1),
        ([(0, 10), (2, 4)], [(0, 10)], 1),
        ([(0, 10), (2, 4), (6, 12)], [(1, 3), (0, 6)], 6 / 12),
        ([(0, 2), (8, 10)], [(1, 3), (9, 11)], 2 / 6),
        ([], [(0, 1)], 0),
        ([(2, 1)], [], 0),
    ],
)
def test_multi_segment_iou_compares_unions(a, b, iou):
    assert multi_segment_iou(a, b) == pytest.approx(iou)


seconds = st.integers(0, 12)
some_spans = st.lists(st.tuples(seconds, seconds), max_size=4)


@given(some_spans, some_spans)
def test_multi_segment_iou_counts_each_second_once(a, b):
    """However the spans overlap, touch, nest or end before they start."""
    covered = [{second for start, end in each for second in range(start, end)} for each in (a, b)]
    both, either = set.intersection(*covered), set.union(*covered)
    assert multi_segment_iou(a, b) == pytest.approx(len(both) / len(either) if either else 0)


@given(spans)
def test_text_written_for_a_span_scores_1(span):
    truth = sample(span, duration_s=1000.0)
    for mode in ("answer", "think"):
        text = off_policy_text(truth, mode)
        assert tiou_reward([text], samples=[truth]) == [1.0]


@given(st.lists(spans, min_size=1, max_size=4))
def test_text_written_for_several_spans_scores_1(windows):
    truth = sample(*windows, duration_s=1000.0)
    text = off_policy_text(truth, "think", task="multi_grounding")
    assert multi_tiou_reward([text], samples=[truth]) == [pytest.approx(1.0)]


@given(clip_scores)
def test_text_written_for_highlights_scores_1(scores):
    truth = sample(duration_s=150.0, clip_scores=scores)
    assume(highlight_targets(truth))
    text = off_policy_text(truth, "answer", task="highlight")
    assert highlight_reward([text], samples=[truth]) == [1.0]


def test_tiou_takes_the_best_fitting_of_several_windows():
    assert tiou_reward(["<answer>6 to 8</answer>"], samples=[sample((0, 4), (6, 8))]) == [1.0]


def test_completions_without_tags_score_only_when_allowed():
    assert tiou_reward(["5 to 10"], samples=[sample()]) == [0.0]
    assert tiou_reward(["5 to 10"], samples=[sample()], require_tags=False) == [1.0]


@pytest.mark.parametrize(
    "text, reward",
    [
        ("<think> a </think> <answer> b </answer>", 1),
        ("\n<THINK>a\nb</THINK>\n<Answer>c</Answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<answer> b </answer>", 0),
        ("<answer> b </answer> <think> a </think>", 0),
        ("<think> a </think> so <answer> b </answer>", 0),
        ("<think> a </think> <answer> b </answer> done", 0),
        ("<think> a </think> <answer> b </answer> <answer> c </answer>", 0),
        ("<think> <think> a </think> <answer> b </answer>", 0),
        ("", 0),
    ],
)
def test_format_is_one_think_block_then_one_answer_block(text, reward):
    assert format_reward([text]) == [reward]


def test_highlight_reward_on_a_worked_example():
    """True: 82 s (2.0), 84 s (3.0); answered: 82 s (3.0), 90 s. F2 = 5 / (2 + 4 * 2), WMSE = (4 * 1 + 9 * 9) / 13."""
    truth = sample(duration_s=150.0, clip_scores={41: (1, 1, 1), 42: (2, 2, 2), 43: (0, 0, 0)})
    assert highlight_targets(truth) == {82.0: 2.0, 84.0: 3.0}
    answer = "<answer> The highlight timestamps are in the 82, 90 seconds. Their saliency scores are 3.0, 1.0 </answer>"
    expected = 0.6 * 0.5 + 0.4 / (1 + 85 / 13)
    assert highlight_reward([answer, "<answer> 82 </answer>"], samples=[truth] * 2) == [pytest.approx(expected), 0.0]


@pytest.mark.parametrize(
    "answered, f2, wmse",
    [
        ([(0, 2.0)], 5 / (1 + 4 * 3), (4 * 2**2 + 5**2 * 5**2) / 33),
        ([(0, 2.0), (2, 2.0), (8, 5.0)], 1, 0),
        ([(0, 2.0), (2, 4.0), (8, 5.0), (10, 3.0), (12, 1.0)], 15 / (5 + 4 * 3), 4 * 2**2 / 33),
        ([(10, 2.0)], 0, (4 * 2**2 + 4 * 2**2 + 5**2 * 5**2) / 33),
    ],
    ids=["two missed", "all right", "two too many", "none of them"],
)
def test_a_missed_highlight_costs_more_than_one_too_many(answered, f2, wmse):
    """True: 0 s and 2 s (2.0), 8 s (5.0). F2 = 5 * right / (answered + 4 * true); errors weigh as the squared truth."""
    truth = sample(duration_s=150.0, clip_scores={0: (1, 1, 1), 1: (1, 1, 1), 4: (4, 4, 4)})
    times, scores = (", ".join(map(str, each)) for each in zip(*answered, strict=True))
    answer = (
        f"<answer> The highlight timestamps are in the {times} seconds. Their saliency scores are {scores}. </answer>"
    )
    assert highlight_reward([answer], samples=[truth]) == [pytest.approx(0.6 * f2 + 0.4 / (1 + wmse))]


def test_highlight_target_is_the_mean_score_plus_1_with_one_decimal():
    assert highlight_targets(sample(clip_scores={3: (1, 1, 2), 0: (0, 0, 1)})) == {0.0: 1.3, 6.0: 2.3}


@pytest.mark.parametrize("name", REWARDS)
def test_every_reward_gives_one_float_in_its_range_per_completion(name):
    texts = ["", "<answer>1 to 2</answer>", "<think>a</think><answer>5 to 10</answer>"]
    truth = sample(clip_scores={1: (4, 4, 4)})
    rewards = REWARDS[name](texts, samples=[truth] * 3, require_tags=True)
    low, high = (-1, 2) if name == "wasserstein" else (0, 1)
    assert len(rewards) == 3 and all(isinstance(value, float) and low <= value <= high for value in rewards)


@pytest.mark.parametrize("task, expected", TASK_VALUES.items())
def test_every_task_is_paid_by_its_own_reward(task, expected):
    """One of two true spans is enough for grounding alone, and highlights are read by their own form."""
    truth = sample((5.0, 10.0), (20.0, 25.0), duration_s=150.0, clip_scores={41: (1, 1, 1), 42: (2, 2, 2)})
    highlights = "The highlight timestamps are in the 82, 84 seconds. Their saliency scores are 2.0, 3.0."
    texts = [f"<answer>{answer}</answer>" for answer in ("5 to 10", "5 to 10, 20 to 25", highlights)]
    assert REWARDS[TASK_REWARDS[task]](texts, samples=[truth] * 3) == expected


def test_every_task_has_a_reward():
    assert set(TASK_REWARDS) == set(TASK_VALUES) == set(get_args(Task))

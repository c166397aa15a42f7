"""Subsets by difficulty: the published weights, shares of strata, and what a draw can be relied on for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.data.draws import (
    draw,
    draw_by_stratum,
    drawn_as_release,
    drawn_as_timelens,
    drawn_as_timelens2,
    span_cell,
    timelens2_weights,
    timelens_weights,
)
from tempsamp_fast.sample import Sample


def sample(index: int, duration_s=100.0, end=10.0, **fields) -> Sample:
    return Sample(f"s{index}", Path(f"v{index}.mp4"), "query", duration_s, ((0.0, end),), **fields)


def test_the_published_weights_of_timelens():
    assert timelens_weights([0.05, 0.25, 0.5, 0.9]) == pytest.approx([1, 0.6065, 0.0796, 0.0001], abs=6e-5)
    alone, *crowd = timelens_weights([0.06, 0.26, 0.27, 0.28, 0.29])
    assert sum(crowd) == pytest.approx(alone * 0.58, rel=0.1)  # a crowded bin counts as one
    assert timelens_weights([1.0, 0.97])[0] > 0


def test_the_published_weights_of_timelens2():
    means = ([0.0] * 8, [0.25] * 8, [0.5] * 8, [0.9] * 8)
    assert timelens2_weights(means) == pytest.approx([1, 0.5625, 0.25, 0.01], abs=1e-6)
    flat, spread = timelens2_weights([[0.5, 0.5], [0.0, 1.0]], p=1.0, q=0.0)
    assert flat == pytest.approx(0, abs=1e-7) and spread == pytest.approx(0.5)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(0, 99), st.data())
def test_a_draw_is_of_different_samples_and_nested(weights, seed, data):
    number = data.draw(st.integers(0, len(weights)))
    chosen = draw(weights, number, seed)
    assert len(set(chosen)) == number and chosen == sorted(chosen)
    assert set(draw(weights, max(number - 1, 0), seed)) <= set(chosen)
    if number <= sum(weight > 1e-6 for weight in weights):
        assert all(weights[index] > 0 for index in chosen)


def test_heavier_samples_are_drawn_more_often_as_their_weights_say():
    counts = Counter(index for seed in range(4000) for index in draw([1.0, 3.0], 1, seed))
    assert counts[1] / 4000 == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ValueError, match="draw_samples=3: must be at most the 2"):
        draw([1.0, 1.0], 3, 0)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), st.integers(1, 8), st.integers(0, 9))
def test_strata_get_their_shares_while_they_last(strata, number, seed):
    shares = {0: 1.0, 1: 1.0, 2: 2.0}
    chosen = draw_by_stratum([1.0] * len(strata), strata, shares, number, seed)
    assert len(set(chosen)) == number
    available, got = Counter(strata), Counter(strata[index] for index in chosen)
    total = sum(shares.get(stratum, 0) for stratum in available)
    for stratum in available:
        share = number * shares.get(stratum, 0) / total if total else 0
        assert got[stratum] >= min(available[stratum], int(share)) - 1


def test_timelens_draws_the_hard_ones_of_every_tenth_of_durations():
    made = [sample(i, duration_s=10.0 + i, offline_ious=((0.05, 0.95)[i % 2],) * 4) for i in range(200)]
    chosen = drawn_as_timelens(made, 50, seed=0)
    assert Counter(int(each.duration_s - 10) // 20 for each in chosen) == dict.fromkeys(range(10), 5)
    assert all(each.offline_ious[0] == 0.05 for each in chosen)
    with pytest.raises(ValueError, match="'s0' has no offline IoUs"):
        drawn_as_timelens([sample(0)], 1, 0)


def test_timelens2_hardly_ever_draws_what_is_solved():
    made = [sample(i, offline_ious=((0.1,), (1.0,))[i % 2]) for i in range(100)]
    assert {each.offline_ious for each in drawn_as_timelens2(made, 50, seed=1)} == {(0.1,)}


def test_the_release_draws_spans_as_its_benchmark_has_them():
    ends = (2.0, 9.0, 40.0)
    made = [sample(i, end=ends[i % 3], difficulty=0.75 if i % 2 else 0.1) for i in range(300)]
    like = [sample(0, end=9.0)] * 3 + [sample(0, end=40.0)] + [sample(0, duration_s=500.0, end=300.0)] * 50
    chosen = drawn_as_release(made, 40, seed=0, like=like)
    assert Counter(map(span_cell, chosen)) == {span_cell(like[0]): 30, span_cell(like[3]): 10}
    assert sum(each.difficulty == 0.75 for each in chosen) >= 36
    with pytest.raises(ValueError, match="'s0' has no difficulty"):
        drawn_as_release([sample(0)], 1, 0, like)
    with pytest.raises(ValueError, match="at most the 300"):
        drawn_as_release(made, 301, 0, like)


@pytest.mark.parametrize(
    ("duration_s", "end", "cell"),
    [(100.0, 9.0, (3, 0)), (100.0, 40.0, (5, 4)), (20.0, 9.0, (3, 4)), (10.0, 10.0, (3, 9)), (100.0, 0.5, (0, 0))],
)
def test_spans_are_alike_by_doublings_of_their_length_and_tenths_of_the_video(duration_s, end, cell):
    assert span_cell(sample(0, duration_s, end)) == cell


def test_the_spans_of_a_sample_count_together():
    assert span_cell(Sample("s", Path("v.mp4"), "query", 100.0, ((0.0, 8.0), (20.0, 29.0)))) == (4, 1)


def test_another_seed_draws_others_of_every_stratum():
    hard = [sample(i, duration_s=10.0 + i, offline_ious=(0.05,), difficulty=0.75) for i in range(200)]
    for drawn in (drawn_as_timelens, lambda *given: drawn_as_release(*given, hard)):
        assert drawn(hard, 50, 0) == drawn(hard, 50, 0) != drawn(hard, 50, 1)


def test_what_is_solved_now_and_then_is_hard():
    """The mean of its answers counts, and not the best."""
    made = [sample(i, duration_s=10.0 + i, offline_ious=((0, 0, 0, 1.0), (0.6,) * 4)[i % 2]) for i in range(200)]
    assert sum(each.offline_ious[-1] == 1 for each in drawn_as_timelens(made, 50, seed=0)) >= 45

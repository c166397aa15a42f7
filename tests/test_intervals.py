"""Distances and overlaps of sets of spans, against twins that count a fine grid."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tempsamp_fast.intervals import length, merge, union_iou, wasserstein_1

EDGES = st.integers(0, 40).map(lambda step: step / 4)
SPANS = st.lists(st.tuples(EDGES, EDGES), max_size=5)
CELLS = 200
"""Of the twins' grid, over 10 s; spans end between cells."""


def covered(spans) -> list[int]:
    """Cells whose middle lies in any span."""
    middles = [(cell + 0.5) * 10 / CELLS for cell in range(CELLS)]
    return [int(any(start < middle < end for start, end in spans)) for middle in middles]


def by_moving_mass(a, b) -> float:
    """W1 as the least work that moves one pile of sand onto the other: grain by grain from the left."""
    grains = len([*filter(None, covered(a))]) * len([*filter(None, covered(b))])
    piles = []
    for spans in (a, b):
        cells = covered(spans)
        each = grains // sum(cells)
        piles.append([cell for cell, is_full in enumerate(cells) if is_full for _ in range(each)])
    return sum(abs(x - y) for x, y in zip(*piles, strict=True)) / grains * 10 / CELLS


@given(SPANS, SPANS)
def test_w1_is_the_least_work_of_moving_one_set_onto_the_other(a, b):
    assume(merge(a) and merge(b))
    assert wasserstein_1(a, b) == pytest.approx(by_moving_mass(a, b), abs=2 * 10 / CELLS)
    assert wasserstein_1(a, b) == pytest.approx(wasserstein_1(b, a))
    assert wasserstein_1(a, merge(a)) == pytest.approx(0, abs=1e-12)


@given(SPANS, SPANS)
def test_the_iou_of_unions_is_that_of_their_cells(a, b):
    both = [x * y for x, y in zip(covered(a), covered(b), strict=True)]
    either = [max(x, y) for x, y in zip(covered(a), covered(b), strict=True)]
    assert union_iou(a, b) == pytest.approx(sum(both) / sum(either) if any(either) else 0)
    assert length(merge(a)) == pytest.approx(sum(covered(a)) * 10 / CELLS)


def test_w1_of_nothing_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        wasserstein_1([(3.0, 3.0)], [(1.0, 2.0)])

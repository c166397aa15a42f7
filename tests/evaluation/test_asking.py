"""Asking held-out queries batch by batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.batch import Completion, Prompt, Sample, VideoPatches
from tempsamp_fast.evaluation.asking import answer_row, evaluate, rounds
from tempsamp_fast.evaluation.protocols import PROTOCOLS

WINDOWS = ((0.0, 1.0), (3.0, 5.0))
SAMPLES = [Sample(f"s{n}", Path(f"v{n}.mp4"), "query", 10.0, WINDOWS) for n in range(5)]


class Loader:
    """Prompts without videos; that of `bad` cannot be read."""

    def __init__(self, bad: str = "") -> None:
        self.bad, self.asked = bad, []

    def prompts(self, samples: Any, modes: Any) -> list[Prompt]:
        self.asked.append(list(modes))
        video = VideoPatches(torch.empty(0, 0), (0, 0, 0), 0.0, torch.empty(0))
        return [
            Prompt(sample, mode, torch.zeros(1, dtype=torch.int64), video)
            for sample, mode in zip(samples, modes, strict=True)
            if sample.sample_id != self.bad
        ]


def sampler(prompts: Any, num_completions: Any) -> list[list[Completion]]:
    assert list(num_completions) == [1] * len(prompts)
    return [[Completion(torch.zeros(1), f"<answer> 3 to 5 </answer> {each.sample.sample_id}")] for each in prompts]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_every_query_is_asked_once_in_its_mode_and_order(batch_size: int) -> None:
    loader: Any = Loader()
    rows = evaluate(SAMPLES, "think", sampler, loader, batch_size)
    assert [row["text"].split()[-1] for row in rows] == [sample.sample_id for sample in SAMPLES]
    assert [mode for modes in loader.asked for mode in modes] == ["think"] * 5 and max(
        map(len, loader.asked)
    ) <= batch_size
    assert [(row["span"], row["iou"]) for row in rows] == [((3.0, 5.0), 1.0)] * 5


def test_a_video_that_cannot_be_read_counts_as_unparsed() -> None:
    loader: Any = Loader(bad="s2")
    rows = evaluate(SAMPLES, "answer", sampler, loader, 2)
    assert [row["iou"] for row in rows] == [1.0, 1.0, 0.0, 1.0, 1.0]
    assert (rows[2]["text"], rows[2]["span"]) == ("", None)


def test_untagged_answers_are_read_where_tags_are_not_required() -> None:
    plain = lambda prompts, _: [[Completion(torch.zeros(1), "3 to 5")] for _ in prompts]
    loader: Any = Loader()
    assert [row["iou"] for row in evaluate(SAMPLES[:1], "answer", plain, loader, 1, require_tags=False)] == [1.0]
    assert [row["iou"] for row in evaluate(SAMPLES[:1], "answer", plain, loader, 1)] == [0.0]


@given(st.lists(st.floats(1, 3600), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 6))
def test_ranks_evaluate_batches_of_like_length_in_every_round(durations: list, size: int, num_ranks: int) -> None:
    """Every sample once; within a round none is longer than any of the round before."""
    samples = [Sample(str(i), Path(f"{i}.mp4"), "", seconds, ()) for i, seconds in enumerate(durations)]
    dealt = rounds(samples, size, num_ranks)
    assert sorted(each.sample_id for of_ranks in dealt for batch in of_ranks for each in batch) == sorted(
        each.sample_id for each in samples
    )
    assert all(len(of_ranks) == num_ranks for of_ranks in dealt)
    lengths = [[each.duration_s for batch in of_ranks for each in batch] for of_ranks in dealt]
    for longer, shorter in itertools.pairwise(lengths):
        assert min(longer) >= max(shorter, default=0)


def test_videos_of_very_different_lengths_keep_ranks_busy_alike() -> None:
    samples = [Sample(str(i), Path(f"{i}.mp4"), "", 10.0 * 1.05**i, ()) for i in range(96)]
    dealt = rounds(samples, 4, 4)
    seconds = [sum(each.duration_s for of_ranks in dealt for each in of_ranks[rank]) for rank in range(4)]
    assert 1 - sum(seconds) / 4 / max(seconds) < 0.15


def test_a_row_has_the_iou_of_its_protocol() -> None:
    """That of the unions, or of a span beyond the video where nothing was read."""
    late = Sample("s", Path("v.mp4"), "query", 10.0, ((5.0, 30.0),))
    for name, sample, text, span, iou in (
        ("timelens2", SAMPLES[0], "[[0, 1], [3, 4]]", (0.0, 1.0), 2 / 3),
        ("timelens", late, "no idea", None, 0.4),
    ):
        row = answer_row(sample, text, protocol=PROTOCOLS[name])
        assert (row["span"], row["iou"]) == (span, pytest.approx(iou))

"""Random crops of training videos: as if the file had been cut there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.data.crop import crop
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.sample import Sample

SECOND = 2.0
GRID = (10, 2, 3)
VIDEO = VideoPatches(torch.arange(60.0)[:, None], GRID, SECOND, torch.arange(10, dtype=torch.float64) * SECOND + 0.5)


@pytest.mark.parametrize("duration_s", [19.6, 21.4], ids=["", "with an end between two frames"])
@pytest.mark.parametrize("windows", [((7.0, 9.5),), ((0.0, 20.0),), ((3.0, 4.0), (15.5, 16.0)), ((18.0, 25.0),)])
def test_a_crop_holds_every_true_span_and_counts_from_its_start(
    windows: tuple[tuple[float, float], ...], duration_s: float
) -> None:
    sample = Sample("clip/0", Path("clip.mp4"), "a square", duration_s, windows)
    firsts = set()
    for seed in range(20):
        (moved,), stretch = crop([sample], VIDEO, torch.Generator().manual_seed(seed))
        first = int(stretch.pixel_values[0, 0]) // 6
        firsts.add(first)
        shift_s = first * SECOND
        assert stretch.grid_thw == (len(stretch.timestamps_s), 2, 3)
        assert stretch.pixel_values[:, 0].tolist() == list(range(first * 6, (first + stretch.grid_thw[0]) * 6))
        assert (stretch.timestamps_s + shift_s).tolist() == VIDEO.timestamps_s[first:][: stretch.grid_thw[0]].tolist()
        assert moved.windows == tuple((start - shift_s, end - shift_s) for start, end in windows)
        assert all(start >= 0 for start, _ in moved.windows)
        end_s = shift_s + moved.duration_s
        assert end_s <= sample.duration_s
        assert all(min(end, sample.duration_s) <= end_s for _, end in windows)
    assert len(firsts) > 1 or windows[0][0] < SECOND


@pytest.mark.parametrize("order", [1, -1])
def test_a_crop_for_several_queries_holds_the_spans_of_each(order: int) -> None:
    windows = [((7.0, 9.5),), ((1.0, 2.0), (12.0, 17.0)), ((3.0, 4.0),)][::order]
    samples = [Sample(f"clip/{i}", Path("clip.mp4"), "a square", 19.6, each) for i, each in enumerate(windows)]
    for seed in range(20):
        moved, stretch = crop(samples, VIDEO, torch.Generator().manual_seed(seed))
        shift_s = int(stretch.pixel_values[0, 0]) // 6 * SECOND
        for sample, each in zip(moved, windows, strict=True):
            assert sample.windows == tuple((start - shift_s, end - shift_s) for start, end in each)
            assert all(start >= 0 and end <= sample.duration_s for start, end in sample.windows)


def test_the_same_position_of_the_training_order_is_cropped_alike(stepper) -> None:
    """Whatever the rank and however often it is made; another seed crops otherwise."""
    words = ("--phases", "sft:1", "--gradient_accumulation_steps", "4", "--random_crop", "1")
    run = stepper(*words).run
    prompts = lambda seed: run.loader.training_prompts(
        TrainingOrder(run.train_samples, seed), [5, 6, 7], ["answer"] * 3
    )
    spans = lambda made: [(prompt.sample.sample_id, prompt.sample.windows, prompt.video.grid_thw) for prompt in made]
    assert spans(prompts(0)) == spans(prompts(0))
    assert spans(prompts(0)) != spans(prompts(1))
    uncropped = {sample.sample_id: sample for sample in run.train_samples}
    assert any(prompt.sample.windows != uncropped[prompt.sample.sample_id].windows for prompt in prompts(0))

"""What loading gives back: limits at their edges, timestamps, and descriptions that fit the rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tempsamp_fast.video.result import Limits, VideoBatch, VideoError, VideoResult

FIGURES = {"frame_pixels": 100, "num_frames": 10, "patch_bytes": 1000}
PATH = Path("clip.mp4")


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_may_reach_its_limit_and_not_pass_it(figure: str) -> None:
    limits = Limits(**{f"max_{name}": value for name, value in FIGURES.items()})  # type: ignore[arg-type]
    limits.check(PATH, **FIGURES)  # type: ignore[arg-type]
    with pytest.raises(VideoError, match=rf"clip\.mp4: .* is over max_{figure} = .*LIMIT_EXCEEDED"):
        limits.check(PATH, **{**FIGURES, figure: FIGURES[figure] + 1})  # type: ignore[arg-type]


def result(times: list[float], second_per_grid: float, status: str = "ok") -> VideoResult:
    grid_t = -(-len(times) // 2)
    return VideoResult(
        PATH,
        status,  # type: ignore[arg-type]
        "OK" if status == "ok" else "DAMAGED",
        num_frames=len(times),
        frame_times_s=torch.tensor(times, dtype=torch.float64),
        grid_thw=(grid_t if status != "failed" else 0, 1, 2),
        second_per_grid=second_per_grid,
    )


def test_a_timestamp_is_the_middle_of_its_patch_and_an_odd_last_frame_stands_alone() -> None:
    assert result([0.0, 0.5, 1.0, 1.6, 2.0], 1.0).timestamps_s().tolist() == [0.25, 1.3, 2.0]


def test_each_loaded_video_keeps_its_own_rows_clock_and_grid() -> None:
    """A partial video has rows like a whole one; a failed one has none and shifts nothing."""
    results = [result([0.0, 1.0], 0.5), result([], 9.0, "failed"), result([0.0, 2.0, 4.0], 4.0, "partial")]
    rows = torch.arange(6.0)[:, None]
    batch = VideoBatch.pack(rows, results, 2)
    assert batch.video_grid_thw.tolist() == [[1, 1, 2], [2, 1, 2]] and batch.second_per_grid.tolist() == [0.5, 4.0]
    first, failed, last = batch.split()
    assert failed is None and first is not None and last is not None
    assert (first.second_per_grid, last.second_per_grid) == (0.5, 4.0)
    assert first.pixel_values[:, 0].tolist() == [0, 1] and last.pixel_values[:, 0].tolist() == [2, 3, 4, 5]
    assert last.timestamps_s.tolist() == [1.0, 4.0] and last.grid_thw == (2, 1, 2)

"""What is kept of a video is of the whole file, and of one way to take its frames; crops are of one position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.batch import VideoPatches, VisionFeatures
from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.crop import crop
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.run.checkpoint import read_video_settings, save_model
from tempsamp_fast.sample import Sample
from tempsamp_fast.video import Geometry, Sampling, patch_cache
from tempsamp_fast.video.patch_cache import PatchCache

SHORT = ("--phases", "sft:1")


def test_features_of_a_crop_are_not_taken_for_those_of_the_whole_video(stepper: Callable, tmp_path: Path) -> None:
    """Neither in memory nor on disk."""
    caching = ("--freeze_vision", "--cache_features", "--patch_cache", str(tmp_path / "kept"))
    for memory_gib in ("1", "0"):
        run = stepper(*SHORT, *caching, "--random_crop", "1", "--video_cache_gib", memory_gib).run
        sample = run.train_samples[0]
        cropped = run.loader.training_prompts(TrainingOrder([sample], seed=0), range(4), ["answer"] * 4)
        run.with_features(cropped)
        (whole,) = run.loader.prompts([sample], ["answer"])
        assert whole.video.is_whole and whole.video.features is None
        assert len(whole.video.pixel_values) == torch.tensor(whole.video.grid_thw).prod()
        assert {each.video.grid_thw[0] for each in cropped} != {whole.video.grid_thw[0]}


def test_features_kept_of_a_whole_video_are_cut_for_a_crop(stepper: Callable) -> None:
    run = stepper(*SHORT, "--freeze_vision", "--cache_features", "--random_crop", "1").run
    (whole,) = run.with_features(run.loader.prompts(run.train_samples[:1], ["answer"]))
    prompts = run.loader.training_prompts(TrainingOrder(run.train_samples[:1], seed=0), range(8), ["answer"] * 8)
    num_rows = {len(each.video.features.embeds) for each in prompts}
    assert len(num_rows) > 1 and max(num_rows) <= len(whole.video.features.embeds)
    for each in prompts:
        assert len(each.video.features.embeds) * 4 == torch.tensor(each.video.grid_thw).prod()


def test_another_position_crops_the_same_video_otherwise(stepper: Callable) -> None:
    """And the same position alike, whatever is asked with it."""
    run = stepper(*SHORT, "--random_crop", "1").run
    sample = [replace(run.train_samples[0], windows=((4.0, 4.5),))]
    crops = lambda positions: [
        (prompt.sample.windows, prompt.video.grid_thw)
        for prompt in run.loader.training_prompts(TrainingOrder(sample, seed=0), positions, ["answer"] * len(positions))
    ]
    together = crops(range(8))
    assert len(set(together)) > 2
    assert crops([6, 3]) == [together[6], together[3]]


def test_another_seed_crops_the_same_positions_otherwise(stepper: Callable) -> None:
    run = stepper(*SHORT, "--random_crop", "1").run
    sample = [replace(run.train_samples[0], windows=((4.0, 4.5),))]
    crops = lambda seed: [
        (prompt.sample.windows, prompt.video.grid_thw)
        for prompt in run.loader.training_prompts(TrainingOrder(sample, seed), range(8), ["answer"] * 8)
    ]
    assert crops(0) == crops(0) != crops(1)


def test_a_crop_may_begin_with_its_span_and_end_with_it() -> None:
    """Of ten patches of 2 s around a span from 6 to 10 s: it begins at 0 to 3 and ends at 5 to 10, each of them."""
    times = torch.arange(10, dtype=torch.float64) * 2
    video = VideoPatches(torch.arange(10.0)[:, None], (10, 1, 1), 2.0, times)
    sample = Sample("clip/0", Path("clip.mp4"), "a square", 20.0, ((6.0, 10.0),))
    ends = set()
    for seed in range(120):
        pixels = crop([sample], video, torch.Generator().manual_seed(seed))[1].pixel_values
        ends.add((int(pixels[0]), int(pixels[-1]) + 1))
    assert {first for first, _ in ends} == {0, 1, 2, 3} and {last for _, last in ends} == {5, 6, 7, 8, 9, 10}


def patches() -> VideoPatches:
    return VideoPatches(torch.zeros(4, 2, dtype=torch.uint8), (1, 2, 2), 1.0, torch.zeros(1, dtype=torch.float64))


OTHER_SAMPLING: dict[str, Any] = {
    "mode": "hf_qwen3", "fps": 3.0, "min_frames": 6, "max_frames": 100, "start_s": 1.0, "end_s": 9.0,
}  # fmt: skip
OTHER_GEOMETRY: dict[str, Any] = {
    "family": "qwen3_vl", "patch_size": 16, "temporal_patch_size": 1, "merge_size": 1, "min_pixels": 1000,
    "max_pixels": 100_000, "total_pixels": 1_000_000, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
}  # fmt: skip


def test_kept_patches_are_of_one_way_to_take_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value of any field of sampling and geometry, another tower and another format find nothing."""
    assert OTHER_SAMPLING.keys() == {each.name for each in fields(Sampling)}
    assert OTHER_GEOMETRY.keys() == {each.name for each in fields(Geometry)}
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"1234")
    cache = PatchCache(tmp_path / "kept", Geometry(), "tower")
    cache.put(video, Sampling(), patches())
    assert cache.get(video, Sampling()) is not None
    for name, value in OTHER_SAMPLING.items():
        assert cache.get(video, Sampling(**{name: value})) is None, name
    for name, value in OTHER_GEOMETRY.items():
        assert PatchCache(cache.folder, Geometry(**{name: value}), "tower").get(video, Sampling()) is None, name
    assert PatchCache(cache.folder, Geometry()).get(video, Sampling()) is None
    with monkeypatch.context() as patch:
        patch.setattr(patch_cache, "FORMAT", patch_cache.FORMAT + 1)
        assert cache.get(video, Sampling()) is None
    (tmp_path / "copy.mp4").write_bytes(b"1234")
    assert cache.get(tmp_path / "copy.mp4", Sampling()) is None
    assert cache.get(video, Sampling()) is not None


def test_kept_features_come_back_whole(tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes(b"1234")
    features = VisionFeatures(torch.rand(1, 3), (torch.rand(1, 3), torch.rand(1, 3)))
    cache = PatchCache(tmp_path / "kept", Geometry(), "tower")
    cache.put(video, Sampling(), replace(patches(), features=features))
    found = cache.get(video, Sampling())
    assert found is not None and found.features is not None and found.is_whole
    kept = (found.features.embeds, *found.features.deepstack)
    assert len(kept) == 3 and all(map(torch.equal, kept, (features.embeds, *features.deepstack)))


def test_a_saved_model_tells_every_setting_that_its_frames_and_prompts_depend_on(
    stepper: Callable, tmp_path: Path
) -> None:
    """Each of them off its default."""
    told = {
        "sampling": "hf_qwen3", "fps": 3.0, "min_frames": 6, "max_frames": 20, "min_pixels": 2000, "max_pixels": 9000,
        "total_pixels": 50_000, "task": "multi_grounding",
    }  # fmt: skip
    assert all(getattr(DataConfig(), name) != value for name, value in told.items())
    run = stepper(*SHORT, *(word for name, value in told.items() for word in (f"--{name}", str(value)))).run
    save_model(tmp_path / "model", run.policy, run.chat, run.config.data)
    assert dataclasses.asdict(read_video_settings(tmp_path / "model")) == dataclasses.asdict(DataConfig(**told))
    assert read_video_settings(tmp_path) == DataConfig()


def test_every_epoch_has_an_order_of_its_own() -> None:
    order = TrainingOrder([None] * 20, seed=3)
    first, second = ([order[epoch * 20 + place] for place in range(20)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_the_video_that_was_asked_for_last_stays_in_memory(stepper: Callable) -> None:
    run = stepper("--phases", "sft:1").run
    samples = list({sample.video: sample for sample in run.train_samples}.values())[:2]
    for sample in samples:
        run.loader.prompts([sample], ["answer"])
    run.loader.config.video_cache_gib = max(video.nbytes for video in run.loader._videos.values()) / 2**30
    run.loader.prompts(samples[::-1], ["answer"] * 2)
    assert list(run.loader._videos) == [samples[0].video]

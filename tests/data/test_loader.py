"""Videos on their way into prompts: decoded once, kept while memory lasts, kept on disk if asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tempsamp_fast.batch import Prompt
from tempsamp_fast.data import loader
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.run import Run

SHORT = ("--phases", "sft:1")


def training_prompts(run: Run, source: PromptLoader, num_prompts: int) -> list[Prompt]:
    return source.training_prompts(
        TrainingOrder(run.train_samples, seed=0), range(num_prompts), ["answer"] * num_prompts
    )


def test_all_queries_about_a_video_share_one_decode(stepper: Callable, decoded: list[Path]) -> None:
    run = stepper(*SHORT).run
    prompts = training_prompts(run, run.loader, 2 * len(run.train_samples))
    videos = {sample.video for sample in run.train_samples}
    assert len(prompts) > len(videos)
    assert sorted(decoded) == sorted(videos)


def test_without_memory_videos_are_decoded_again(stepper: Callable, decoded: list[Path]) -> None:
    run = stepper(*SHORT, "--video_cache_gib", "0").run
    first, second = (training_prompts(run, run.loader, 1)[0] for _ in range(2))
    assert decoded == [first.sample.video] * 2
    assert torch.equal(first.video.pixel_values, second.video.pixel_values)


def test_a_bad_video_is_replaced_by_the_next_good_sample(stepper: Callable) -> None:
    """Behind the last one by the first."""
    run = stepper(*SHORT, "--on_bad_sample", "skip").run
    samples = list({sample.video: sample for sample in run.train_samples}.values())[:6]
    run.loader.skipped = {samples[index].video: "broken" for index in (2, 3, 5)}
    order, places = TrainingOrder(samples, seed=0), {sample.sample_id: index for index, sample in enumerate(samples)}
    prompts = run.loader.training_prompts(order, range(6), ["answer"] * 6)
    asked = {order[place]: places[prompt.sample.sample_id] for place, prompt in enumerate(prompts)}
    assert asked == {0: 0, 1: 1, 2: 4, 3: 4, 4: 4, 5: 0}


def test_a_video_that_lasts_another_time_than_annotated_is_told_once(
    stepper: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    run = stepper(*SHORT).run
    sample = run.train_samples[0]
    for duration_s, num_told in ((sample.duration_s, 0), (2 * sample.duration_s, 1), (3 * sample.duration_s, 1)):
        run.loader.prompts([replace(sample, duration_s=duration_s)], ["answer"])
        assert caplog.text.count("but is annotated as") == num_told


def test_the_disk_cache_gives_the_same_prompts_without_decoding(
    stepper: Callable, decoded: list[Path], tmp_path: Path
) -> None:
    run = stepper(*SHORT, "--patch_cache", str(tmp_path / "patches")).run
    (fresh,) = training_prompts(run, run.loader, 1)
    assert decoded == [fresh.sample.video]
    (stored,) = training_prompts(run, PromptLoader(run.chat, run.loader.geometry, run.config.data), 1)
    assert len(decoded) == 1
    assert torch.equal(stored.input_ids, fresh.input_ids)
    assert torch.equal(stored.video.pixel_values, fresh.video.pixel_values)
    assert torch.equal(stored.video.timestamps_s, fresh.video.timestamps_s)


def test_indexes_are_kept_beside_the_patches(stepper: Callable, decoded: list[Path], tmp_path: Path) -> None:
    """Another sampling of the same files needs other patches, and reads no file through again."""
    pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
    for fps in ("2", "1"):
        run = stepper(*SHORT, "--video_backend", "native", "--patch_cache", str(tmp_path / "kept"), "--fps", fps).run
        training_prompts(run, run.loader, 1)
    assert len(decoded) == 2 and len(list((tmp_path / "kept").glob("*.pt"))) == 2
    assert len(list((tmp_path / "kept" / "indexes").iterdir())) == 1


def test_videos_are_decoded_on_the_device_of_the_setting(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from a GPU is kept in host memory; here the decoder only notes what it was asked for."""
    asked: list[str] = []
    load = loader.load_videos

    def noting(*arguments, device: str, **options):
        asked.append(device)
        return load(*arguments, device=device, **options)

    monkeypatch.setattr(loader, "load_videos", noting)
    run = stepper(*SHORT, "--video_device", "auto").run
    (on_auto,) = training_prompts(run, run.loader, 1)
    on_cpu_only = replace(run.config.data, video_device="cpu")
    (on_cpu,) = training_prompts(run, PromptLoader(run.chat, run.loader.geometry, on_cpu_only), 1)
    assert asked[0] == ("auto" if not torch.cuda.is_available() else "cuda:0") and asked[-1] == "cpu"
    assert on_auto.video.pixel_values.device.type == "cpu"
    assert torch.equal(on_auto.video.pixel_values, on_cpu.video.pixel_values)


def test_a_folder_of_frames_and_a_file_in_capitals_are_trained_on_and_asked_about(
    trainer, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first steps of one's own data, through both doors."""
    folder = tmp_path / "videos"
    (folder / "drawn").mkdir(parents=True)
    for index in range(24):
        Image.new("RGB", (64, 48), (10 * index, 0, 0)).save(folder / f"drawn/{index:04}.jpg")
    (folder / "drawn/fps.txt").write_text("3")
    shutil.copy(next((clips / "videos").glob("*.mp4")), folder / "loud.MP4")
    entry = {"duration": 8.0, "timestamps": [[1.0, 3.0]], "sentences": ["a square appears"]}
    (tmp_path / "mine.json").write_text(json.dumps({"drawn": entry, "loud": entry}))
    words = ("--annotations", str(tmp_path / "mine.json"), "--videos", str(folder), "--phases", "sft:1")
    (row,) = [row for row in trainer.main(tmp_path / "run", *words) if row["phase"] == "sft/answer"]
    assert row["data/bad_videos"] == 0
    model = latest_checkpoint(tmp_path / "run")[0] / "model"
    plot = ("--plot", str(tmp_path / "answer.png"), "--max_completion_length", "4")
    capsys.readouterr()
    assert infer_main(["--model", str(model), "--video", str(folder / "drawn"), "--query", "a square", *plot]) == 0
    assert json.loads(capsys.readouterr().out)["duration_s"] == 8.0 and (tmp_path / "answer.png").exists()

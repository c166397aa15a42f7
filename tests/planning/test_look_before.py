"""What would end a run is told before it starts: missing videos, prompts longer than a row, names that are no model."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from tempsamp_fast.arguments import default_recipe, describe_settings, parse_args
from tempsamp_fast.config import DataConfig, ModelConfig, TrainConfig
from tempsamp_fast.data.__main__ import main as data_main
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.eval import main as eval_main
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.model import loading
from tempsamp_fast.model.architectures import model_config
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.model.loading import found_checkpoint
from tempsamp_fast.plan import decided
from tempsamp_fast.planning.estimate import num_frames, text_and_video_tokens, video_grid
from tempsamp_fast.planning.look import look_at_prompts, look_for_videos
from tempsamp_fast.run.checkpoint import latest_checkpoint, model_folder
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.sample import Sample
from tempsamp_fast.score import main as score_main
from tempsamp_fast.train import main
from tempsamp_fast.video.probe import header_facts

EVALUATED = ("--max_eval_samples", "99")
ENTRY = {"duration": 8.0, "timestamps": [[1.0, 3.0]], "sentences": ["a square appears"]}


@pytest.fixture
def annotated(clips: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`annotated(name=entry)`: a file of these videos beside those of the clips, as command line words."""

    def write(**entries: Any) -> list[str]:
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(json.loads((clips / "annotations/train.json").read_text()) | entries))
        return ["--annotations", str(path), "--videos", str(clips / "videos")]

    return write


def no_step(run: Run, *_: object) -> None:
    raise AssertionError("a step was taken")


@pytest.mark.parametrize("where", ["annotations", "eval_annotations"])
def test_a_missing_video_is_counted_and_named_before_the_first_step(
    trainer, annotated, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(Run, "answer", no_step)
    words = annotated(lost=ENTRY, gone=ENTRY)
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:9", f"--{where}", words[1], *EVALUATED))
    assert "2 of 8 videos are missing" in line and "lost.mp4" in line and "--on_bad_sample skip" in line


def test_a_missing_folder_says_how_many_are_missing_and_what_to_set(trainer, refused, tmp_path: Path) -> None:
    for more in ((), ("--on_bad_sample", "skip"), ("--dry_run",)):
        line = refused(trainer.flags(tmp_path / "run", "--videos", str(tmp_path / "nowhere"), *more))
        assert "no such folder, so all 6 videos are missing" in line and "--videos" in line


def test_a_dry_run_of_10000_videos_names_the_missing_one_within_2_s(tmp_path: Path) -> None:
    videos = [tmp_path / f"{number}.mp4" for number in range(10_000)]
    for video in videos:
        video.touch()
    videos[7777].unlink()
    samples = [Sample(str(i), video, "query", 8.0, ((1.0, 2.0),)) for i, video in enumerate(videos)]
    start = time.process_time()
    with pytest.raises(ValueError, match=r"1 of 10000 videos are missing: \S+/7777.mp4;"):
        look_for_videos(samples, tmp_path, "raise")
    assert time.process_time() - start < 2


def test_a_dry_run_prints_the_plan_and_then_names_the_missing_video(
    trainer, annotated, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = trainer.flags(tmp_path / "run", *annotated(lost=ENTRY), "--dry_run")
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr()
    assert "nothing was loaded" in printed.out and "1 of 7 videos are missing" in printed.err
    with caplog.at_level(logging.WARNING):
        main([*words, "--on_bad_sample", "skip"])
    assert "1 of 7 videos are missing" in caplog.text


@pytest.mark.parametrize("setting", ["annotations", "eval_annotations"])
def test_a_dry_run_names_a_file_that_is_not_there(trainer, refused, tmp_path: Path, setting: str) -> None:
    for name in ("mine.jsn", "charades-tset", str(tmp_path)):
        line = refused(trainer.flags(tmp_path / "run", "--dry_run", f"--{setting}", name))
        assert line.startswith(f"{setting}={name!r}: no such file")


@pytest.mark.parametrize(
    ("setting", "name", "text", "named"),
    [
        ("rewards", "mine.py:mine", "def mine(completions)\n    return []\n", "mine.py: line 1: SyntaxError"),
        (
            "rewards",
            "mine.py:mine",
            "def mine(completions):\n    return [1]\n",
            "mine.py: line 1: mine returned 1 rewards",
        ),
        ("rewards", "mine.py:mine", "def mind(completions):\n    return []\n", "did you mean 'mind'"),
        ("prompt_file", "mine.yaml", "answer: '{qery}'\n", "mine.yaml: line 1: the template of answer has no field"),
    ],
)
def test_a_dry_run_tries_own_rewards_and_prompts(
    trainer, refused, tmp_path: Path, setting: str, name: str, text: str, named: str
) -> None:
    (tmp_path / name.partition(":")[0]).write_text(text)
    assert named in refused(trainer.flags(tmp_path / "run", "--dry_run", f"--{setting}", str(tmp_path / name)))


LONG = ENTRY | {"sentences": ["word " * 40_000]}


def test_a_prompt_longer_than_a_row_is_named_before_the_first_step(
    trainer, annotated, clips: Path, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "answer", no_step)
    name = next((clips / "videos").glob("*.mp4")).stem
    for more in ((), ("--dry_run",)):
        words = annotated(**{name: LONG})
        line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:9", *words, *more))
        assert "longer" in line and f"'{name}/0'" in line and "max_tokens_per_row=" in line and len(line) < 1000


def test_a_prompt_is_as_long_as_its_own_video_makes_it(clips: Path) -> None:
    """Not as frames of 1280 x 720 would, by which it looked too long, nor as long as annotated."""
    video, data = next((clips / "videos").glob("*.mp4")), DataConfig()
    shape = model_config(ModelConfig(model="Qwen/Qwen2.5-VL-3B-Instruct"))
    geometry = geometry_of(shape, data.min_pixels, data.max_pixels, data.total_pixels)
    facts = header_facts(video)
    grid = video_grid(geometry, num_frames(facts.duration_s, data), (facts.height, facts.width))
    number = text_and_video_tokens(grid, shape, 99)
    sample = Sample("clip/0", video, "a square appears", 1000.0, ((1.0, 3.0),))
    look_at_prompts([sample], data, shape, number, count=lambda _: 99)
    with pytest.raises(ValueError, match=f"'clip/0' with {number} tokens"):
        look_at_prompts([sample], data, shape, number - 1, count=lambda _: 99)


def test_skipping_leaves_a_prompt_out_that_is_longer_than_a_row(
    trainer, annotated, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every sample is asked for once; the old name of the setting works."""
    name = next((clips / "videos").glob("*.mp4")).stem
    words = ["--phases", "sft:1epoch", *annotated(**{name: LONG}), "--on_bad_video", "skip"]
    with caplog.at_level(logging.WARNING):
        rows = trainer.main(tmp_path / "run", *words)
    assert sum(row["data/bad_videos"] for row in rows) == 1 and all(row["optim/grad_norm"] > 0 for row in rows)
    assert f"'{name}/0'" in caplog.text


def test_a_prompt_that_turns_out_too_long_is_skipped_or_refused_by_its_name(trainer, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "--phases", "sft:1")
    sample = run.train_samples[0]
    small = PromptLoader(
        run.chat, run.loader.geometry, replace(run.config.data, on_bad_sample="skip"), max_prompt_tokens=10
    )
    assert small.prompts([sample], ["answer"]) == [] and sample.sample_id in small.skipped
    small = PromptLoader(run.chat, run.loader.geometry, run.config.data, max_prompt_tokens=10)
    with pytest.raises(ValueError, match=rf"{sample.sample_id}.*max_tokens_per_row=10"):
        small.prompts([sample], ["answer"])


def test_a_run_made_with_the_old_name_of_the_setting_can_be_resumed(tmp_path: Path) -> None:
    settings = parse_args(["--on_bad_video", "skip"]).as_dict()
    assert settings["data"]["on_bad_sample"] == "skip"
    settings["data"]["on_bad_video"] = settings["data"].pop("on_bad_sample")
    for name in ("save_minutes", "eval_start"):
        del settings["train"][name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    resumed = parse_args(["--resume", str(tmp_path)])
    assert resumed.data.on_bad_sample == "skip" and resumed.train.save_minutes == 30


def test_a_clip_annotated_as_longer_than_it_is_warns_once(
    trainer, annotated, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = next((clips / "videos").glob("*.mp4")).stem
    words = annotated(**{name: ENTRY | {"duration": 60.0}})
    run = trainer.run(tmp_path / "run", "--phases", "sft:1", *words)
    for _ in range(2):
        for sample in run.train_samples:
            run.loader.prompts([sample], ["answer"])
    warned = [record.getMessage() for record in caplog.records if "annotated as" in record.getMessage()]
    assert len(warned) == 1 and name in warned[0] and "60.0 s" in warned[0]


def test_data_check_takes_a_file_of_ones_own(annotated, capsys: pytest.CaptureFixture[str]) -> None:
    _, file, *videos = annotated(lost=ENTRY)
    for words, code, said in (
        ([file, *videos], 1, "missing: 1"),
        (["charades-tets", *videos], 2, "charades-test"),
        ([file, "--videos", "nowhere"], 2, "no such folder"),
    ):
        with pytest.raises(SystemExit) as exit_:
            data_main(["check", *words])
        printed = capsys.readouterr()
        assert exit_.value.code == code and said in printed.out + printed.err


@pytest.mark.parametrize("seed", [2**63, 2**64, -(2**63), 10**30])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"^seed={seed}: must be between"):
        TrainConfig(seed=seed)


@pytest.mark.parametrize(
    "name", ["eval_annotations", "annotations", "videos", "model", "output_dir", "deepspeed_config"]
)
def test_an_empty_value_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}='': must be a name"):
        parse_args([f"--{name}", ""])


@pytest.mark.parametrize(
    ("words", "recipe"),
    [
        ([], "tiny_cpu"),
        (["--model", "tiny", "--annotations=synthetic"], "tiny_cpu"),
        (["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--annotations", "a.json", "--videos", "v"], "own_videos"),
        (["--model=Qwen/Qwen3-VL-4B-Instruct"], "own_videos"),
        (["--annotations", "a.json", "--videos", "v"], "own_videos"),
    ],
)
def test_the_toy_recipe_is_for_the_toy_alone(words: list[str], recipe: str) -> None:
    """Own data or an own model never get its rates, crops, pixels and answer lengths; what was taken is told."""
    config = parse_args(words)
    assert default_recipe(words) == recipe
    is_toy = recipe == "tiny_cpu"
    assert (config.train.learning_rate == 1e-3) == (config.data.random_crop == 1) == is_toy
    assert (config.data.max_pixels == 3136) == (config.algorithm.beta == 0) == is_toy
    assert config.train.output_dir == ("runs/tiny" if is_toy else "runs/own_videos")
    described = describe_settings(words, config)
    for shown in (recipe, config.model.model, f"learning rate {config.train.learning_rate:g}", "beta", "tokens"):
        assert shown in described
    assert decided(config, 1).train.zero_stage == "0"


@pytest.mark.parametrize("name", ["videos", "eval_annotations"])
def test_own_files_are_not_dropped_for_the_embedded_data(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}='mine': must be given with --annotations"):
        parse_args([f"--{name}", "mine"])


@pytest.mark.parametrize("recipe", ["tiny_cpu", "own_videos", "charades_qwen2_5_vl_7b", "timelens_qwen3_5_4b"])
def test_what_a_start_prints_fits_80_columns(recipe: str) -> None:
    """But for paths that do not."""
    words = ["--config", recipe, *([] if recipe == "tiny_cpu" else ["--annotations", "a.json", "--videos", "v"])]
    lines = describe_settings(words, parse_args(words)).split("\n")
    assert len(lines) > 8 and max(map(len, lines)) <= 80


def test_every_start_prints_the_recipe_and_its_main_settings(trainer, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        main(trainer.flags(tmp_path / "run", "--dry_run"))
    assert f"recipe   {trainer.recipe}" in caplog.text and "learning rate 0.0002" in caplog.text


def test_one_process_started_by_accelerate_is_told(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU it starts no more than one, silently."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    main(trainer.flags(tmp_path / "run", "--dry_run"))
    assert "accelerate as one process" in caplog.text and "torchrun" in caplog.text


def test_a_run_folder_stands_for_its_newest_checkpoint(finished_run, clips: Path, tmp_path: Path, capsys) -> None:
    """In every command that takes a model; `score` takes the newest answers of it."""
    run, newest = finished_run.folder, latest_checkpoint(finished_run.folder)[0]
    for given in (run, newest, newest / "model"):
        assert model_folder(str(given)) == str(newest / "model")
    assert decided(parse_args(["--model", str(run)]), 1).model.model == str(newest / "model")
    video = next((clips / "videos").glob("*.mp4"))
    words = ["--model", str(run), "--query", "a square", "--max_completion_length", "4", "--video", str(video)]
    assert infer_main(words) == 0
    annotations = str(clips / "annotations/test.json")
    asked = ["--annotations", annotations, "--videos", str(clips / "videos"), "--output", str(tmp_path / "eval")]
    assert eval_main(["--model", str(run), *asked, "--max_samples", "1", "--max_completion_length", "4"]) == 0
    capsys.readouterr()
    files = sorted((run / "eval").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    subset = {row["video"].split("/")[-1].split(".")[0] for row in rows}
    few = {name: entry for name, entry in json.loads(Path(annotations).read_text()).items() if name in subset}
    (tmp_path / "few.json").write_text(json.dumps(few))
    score_main(["--predictions", str(run), "--annotations", str(tmp_path / "few.json")])
    assert files[-1].name in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text("{}")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        model_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["runs/x", "./x", "../x", "/x", "~/x", "here/x", "a/b/c", "here/", "a b", "a/n\u00e9"])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr("tempsamp_fast.model.loading._why_unreachable", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"model=.*(no such folder|no config.json in this folder)"):
        found_checkpoint(name)


@pytest.mark.parametrize("what", ["closed", "silent", "unknown", "offline"])
def test_a_hub_that_cannot_be_reached_is_told_within_5_s(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """For a name that is not in the cache; one that is there is taken from it."""
    monkeypatch.setattr(loading, "HUB_TIMEOUT_S", 0.2)  # the rest is for a busy machine
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", what == "offline")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hosts = {"silent": f"127.0.0.1:{silent.getsockname()[1]}", "unknown": "nowhere.invalid"}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://{hosts.get(what, '127.0.0.1:9')}")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"model='nobody/nothing': no such folder, nor .*(cannot|did not|OFFLINE)"):
            found_checkpoint("nobody/nothing")
        assert time.monotonic() - start < 5
        monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_: "/cache/abc/config.json")
        assert found_checkpoint("nobody/nothing") == "/cache/abc"


def test_the_clock_asks_for_a_checkpoint_and_rank_0_decides(trainer, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "--phases", "sft:2", "--save_minutes", "1")
    at = next(plan(run.phases))
    assert not run.is_save_step(at)
    run._saved_s -= 61
    assert run.is_save_step(at)
    run.rank = 1
    assert not run.is_save_step(at)
    run.rank, run.config.train.save_minutes = 0, 0.0
    assert not run.is_save_step(at)


def test_the_clock_begins_anew_with_a_checkpoint(trainer, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "--phases", "sft:2", "--save_minutes", "1")
    at = next(plan(run.phases))
    run._saved_s -= 61
    run.save(1)
    run.saving.finish()
    assert not run.is_save_step(at)


def test_a_prompt_of_as_many_tokens_as_a_row_is_not_too_long(trainer, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "--phases", "sft:1", "--on_bad_sample", "skip")
    (whole,) = run.loader.prompts(run.train_samples[:1], ["answer"])
    for num_tokens, is_taken in ((len(whole.input_ids), True), (len(whole.input_ids) - 1, False)):
        run.loader.max_prompt_tokens = num_tokens
        assert bool(run.loader.prompts(run.train_samples[:1], ["answer"])) is is_taken


def test_settings_of_the_clock_are_checked() -> None:
    with pytest.raises(ValueError, match=r"^save_minutes=-1: must be zero or more"):
        TrainConfig(save_minutes=-1)
    assert DataConfig().on_bad_sample == "raise"

"""Training with several questions about a video in a row: the answers and gradients of one row per question."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempsamp_fast.learning import update
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.schedule import plan

SET_BY_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
WORDS = (
    *("--phases", "sft:1,tempsamp:2", "--beta", "0.04", "--shaping", "anchor", "--prompts_per_device", "4"),
    *("--queries_per_video", "2", "--gradient_accumulation_steps", "1", "--max_completion_length", "6"),
)


def test_trees_train_as_rows_of_single_questions_do(stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts and answers: only what is computed once differs."""
    together = stepper(*WORDS)
    found = together.steps()
    saving = [step["batch/tree_saving"] for step in found]
    assert min(saving) > 1 and max(saving) > 1.1
    packed = update.pack
    monkeypatch.setattr(
        update, "pack", lambda groups, **options: [row for group in groups for row in packed([group], **options)]
    )
    expected = stepper(*WORDS).steps()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch/num_tokens"] < theirs["batch/num_tokens"]
        for name in ("loss", "optim/grad_norm", "reward/on_policy_mean", "policy/kl"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name


def test_trees_longer_than_a_row_are_not_cut(stepper) -> None:
    """With room for the longest prompt alone every tree runs in stages: the same tokens, losses and gradients."""
    whole, staged = stepper(*WORDS), stepper(*WORDS)
    train = staged.run.config.train
    for at in plan(whole.run.phases):
        expected, groups = whole.run.update(at, whole.groups(at)), staged.groups(at)
        budget, train.max_tokens_per_row = train.max_tokens_per_row, max(map(update._longest_part, groups))
        found = staged.run.update(at, groups)
        train.max_tokens_per_row = budget
        assert found["batch/num_tokens"] == expected["batch/num_tokens"]
        for name in ("loss", "optim/grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-7), name


def test_questions_about_a_video_share_its_stretch(stepper) -> None:
    run = stepper(*WORDS, "--random_crop", "1").run
    prompts = run.prompts(next(plan(run.phases)))
    videos = {id(prompt.video) for prompt in prompts}
    assert len(videos) < len(prompts)
    by_path: dict[Path, set[int]] = {}
    for prompt in prompts:
        by_path.setdefault(prompt.sample.video, set()).add(id(prompt.video))
        assert all(0 <= start < end <= prompt.sample.duration_s for start, end in prompt.sample.windows)
    assert any(len(of_path) == 1 for of_path in by_path.values())


def test_a_resumed_run_goes_on_with_the_same_questions(trainer, tmp_path: Path) -> None:
    words = ("--phases", "sft:1,tempsamp:3", *WORDS[2:], "--save_steps", "2")
    whole = trainer.main(tmp_path / "whole", *words)
    trainer.main(tmp_path / "part", "--phases", "sft:1,tempsamp:1", *words[2:])
    rest = trainer.main(tmp_path / "part", *words, "--resume", str(tmp_path / "part"))
    compared = ("loss", "optim/grad_norm", "batch/num_tokens", "batch/tree_saving")
    for ours, theirs in zip(rest, whole, strict=True):
        assert {name: ours.get(name) for name in compared} == {name: theirs.get(name) for name in compared}


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(trainer, tmp_path: Path) -> None:
    """SIGKILL after a step that no checkpoint has: records and weights of the run that nobody disturbed."""
    words = ("--phases", "sft:1,tempsamp:5", *WORDS[2:], "--save_steps", "2")
    runs = [tmp_path / name for name in ("whole", "killed")]
    trainer.main(runs[0], *words)
    command = [sys.executable, "-m", "tempsamp_fast.train", *trainer.flags(runs[1], *words)]
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHER}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (runs[1] / "metrics.jsonl").is_file() or len(read_metrics(runs[1])) < 4:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
        process.kill()
    trainer.main(runs[1], *words, "--resume", str(runs[1]))
    whole, killed = (
        [{name: each for name, each in row.items() if not name.startswith(("time/", "perf/"))} for row in rows]
        for rows in map(read_metrics, runs)
    )
    assert killed == whole and len(whole) >= 6
    files = [latest_checkpoint(run)[0] / "model/model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("words", [("--prompts_per_device", "3"), ("--sft_prompts_per_device", "5")])
def test_rows_that_would_cut_a_video_are_refused(stepper, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{words[0][2:]}={words[1]}.*multiple of queries_per_video=2"):
        stepper(*WORDS, *words)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1", "3"])
def test_two_ranks_train_as_one_and_keep_videos_whole(trainer, tmp_path: Path, stage: str) -> None:
    words = ("--phases", "sft:2,tempsamp:4", *WORDS[2:], "--gradient_accumulation_steps")
    recorded = str(tmp_path / "rollouts.jsonl")
    expected = trainer.main(tmp_path / "one", *words, "2", "--record_rollouts", recorded)
    found = trainer.ranks(tmp_path / "two", 2, *words, "1", "--replay_rollouts", recorded, "--zero_stage", stage)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["batch/tree_saving"] > 1
        for name in ("loss", "optim/grad_norm", "policy/kl", "reward/on_policy_mean"):
            if name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), (ours["step"], name)

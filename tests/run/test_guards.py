"""What the trainer does when a step goes wrong: non-finite numbers, too little memory, bad videos, SIGTERM."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.learning import update
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.train import main

GRPO = ("--phases", "tempsamp:3", "--beta", "0.04")
LONGER_ONES = ("--on_bad_sample", "skip")
"""Samples that these steps do not take may be longer than a row."""


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[int], Any]) -> None:
    """From now on the n-th call of the loss gives `spoiled(n)(loss)`, where that is not None."""
    policy_loss, calls = update.policy_loss, iter(range(10**6))

    def spoiling(*arguments: Any) -> Any:
        head = policy_loss(*arguments)

        def spoiled_head(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
            loss, metrics = head(hidden, weight)
            change = spoiled(next(calls))
            return (change(loss) if change else loss), metrics

        return spoiled_head

    monkeypatch.setattr(update, "policy_loss", spoiling)


class InfiniteGradient(torch.autograd.Function):
    """The loss itself stays finite."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.inf


SPOILED = {
    "NaN loss": lambda loss: loss * math.nan,
    "infinite loss, finite gradient": lambda loss: loss + math.inf,
    "infinite gradient, finite loss": InfiniteGradient.apply,
}


NAN, INFINITE, INFINITE_GRADIENT = SPOILED


@pytest.mark.parametrize(
    ("what", "stage"),
    [
        *((what, "1") for what in SPOILED),
        *((what, stage) for what, stage in ((NAN, "0"), (INFINITE_GRADIENT, "3"))),
        *(slow(what, stage) for what in SPOILED for stage in "023"),
    ],
)
def test_a_non_finite_step_leaves_the_weights_and_the_next_step_learns(
    stepper, monkeypatch: pytest.MonkeyPatch, what: str, stage: str
) -> None:
    small = stepper(*GRPO, "--zero_stage", stage)
    run, steps = small.run, list(plan(small.run.phases))
    spoil_loss(monkeypatch, lambda call: SPOILED[what] if call == 1 else None)
    run.folder.mkdir(exist_ok=True)
    before = small.weights()
    groups = small.groups(steps[0])
    metrics = run.update(steps[0], groups)
    assert metrics["optim/step_skipped"] == 1 and torch.equal(small.weights(), before)
    (dump,) = (run.folder / "skipped_steps").iterdir()
    described = json.loads(dump.read_text())
    assert [group["sample_id"] for group in described["groups"]] == [each.prompt.sample.sample_id for each in groups]
    assert described["groups"][0]["answers"][0]["rewards"] == groups[0].completions[0].rewards
    assert not math.isfinite(described["metrics"]["optim/grad_norm"])
    metrics = run.update(steps[1], small.groups(steps[1]))
    assert metrics["optim/step_skipped"] == 0 and not torch.equal(small.weights(), before)
    assert torch.isfinite(small.weights()).all()


def test_a_step_is_skipped_when_any_of_its_updates_is(stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    small = stepper(*GRPO, "--updates_per_batch", "2")
    at = next(plan(small.run.phases))
    spoil_loss(monkeypatch, lambda call: SPOILED["NaN loss"] if call == 0 else None)
    small.run.folder.mkdir(exist_ok=True)
    before = small.weights()
    metrics = small.run.update(at, small.groups(at))
    assert not torch.equal(small.weights(), before), "the second update is fine"
    assert metrics["optim/step_skipped"] == 1 and small.run.skipped_steps.in_a_row == 1
    assert len(list((small.run.folder / "skipped_steps").iterdir())) == 1


def test_too_many_non_finite_steps_in_a_row_end_the_run(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, lambda call: SPOILED["NaN loss"])
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:5", "--max_skipped_steps", "1"))
    assert "step 1: the loss or gradient was not finite 2 times in a row" in line and "skipped_steps" in line
    assert [row["optim/step_skipped"] for row in read_metrics(tmp_path / "run")] == [1]


def out_of_memory(_: torch.Tensor) -> torch.Tensor:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


class OutOfMemoryBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def fails_at(call: int) -> Callable[..., None]:
    """A function that runs out of memory the n-th time."""
    calls = itertools.count()

    def fails(*_: Any) -> None:
        if next(calls) == call:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    return fails


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("0", OutOfMemoryBackward.apply),
        ("1", out_of_memory),
        slow("0", out_of_memory),
        slow("2", out_of_memory),
    ],
)
@pytest.mark.parametrize("failing_row", [slow(0), 1])
def test_a_batch_that_does_not_fit_is_packed_again_in_shorter_rows(
    stepper, monkeypatch: pytest.MonkeyPatch, stage: str, change: Any, failing_row: int
) -> None:
    """The update is the one of a run that began with the shorter rows, to the bit."""
    words = (*GRPO, "--zero_stage", stage, "--prompts_per_device", "2", "--gradient_accumulation_steps", "2")
    small = stepper(*words)
    at = next(plan(small.run.phases))
    groups = small.groups(at)
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda call: change if call == failing_row else None)
        metrics = small.run.update(at, groups)
    assert math.isfinite(metrics["optim/grad_norm"]) and metrics["optim/step_skipped"] == 0
    budget = int(metrics["batch/max_tokens_per_row"])
    other = stepper(*words, "--max_tokens_per_row", str(budget), *LONGER_ONES)
    assert other.run.update(at, groups)["loss"] == metrics["loss"]
    assert torch.equal(other.weights(), small.weights())


def test_a_group_that_does_not_fit_is_run_in_stages_of_its_prompt(stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a row would not hold the prompt."""
    small = stepper(*GRPO)
    at = next(plan(small.run.phases))
    groups = small.groups(at)
    longest_prompt = max(len(group.prompt.input_ids) for group in groups)
    assert max(group.num_tokens for group in groups) < 2 * longest_prompt
    with monkeypatch.context() as patch:
        spoil_loss(patch, lambda call: out_of_memory if call == 0 else None)
        metrics = small.run.update(at, groups)
    assert metrics["batch/max_tokens_per_row"] == longest_prompt
    other = stepper(*GRPO, "--max_tokens_per_row", str(longest_prompt), *LONGER_ONES)
    assert other.run.update(at, groups)["loss"] == metrics["loss"]
    assert torch.equal(other.weights(), small.weights())


def test_a_group_that_does_not_fit_has_room_for_its_longest_answer(stepper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the prompt and than half a row."""
    small = stepper("--phases", "sft:1", "--gradient_accumulation_steps", "1")
    at = next(plan(small.run.phases))
    (group,) = small.groups(at)
    (answer,) = group.completions
    times = 1 + 2 * len(group.prompt.input_ids) // len(answer.ids)
    longer = replace(answer, ids=answer.ids.repeat(times))
    spoil_loss(monkeypatch, lambda call: out_of_memory if call == 0 else None)
    metrics = small.run.update(at, [replace(group, completions=[longer])])
    assert metrics["batch/max_tokens_per_row"] == len(longer.ids)


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        slow(("--zero_stage", "1"), {"reduce_bucket_size": 20_000}),
        (("--zero_stage", "2"), {"reduce_bucket_size": 20_000, "overlap_comm": True}),
        slow(("--zero_stage", "2", "--offload", "optimizer"), {}),
        slow(("--zero_stage", "2", "--dtype", "bfloat16"), {}),
    ],
)
@pytest.mark.parametrize("failing_row", [slow(0), 1])
def test_half_a_backward_pass_leaves_nothing_behind(
    stepper, tmp_path: Path, words: tuple[str, ...], settings: dict[str, Any], failing_row: int
) -> None:
    """A single rank's gradients are those of a run that began with the shorter rows, in this step and the next."""
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": settings}))
    words = (*GRPO, *words, "--deepspeed_config", str(file), "--max_logp_gap", "0")  # its groups are used twice
    small = stepper(*words)
    first, second, _ = plan(small.run.phases)
    groups = small.groups(first)
    in_the_middle = small.run.policy.base_model.model.language_model.layers[0].mlp.down_proj.weight
    handle = in_the_middle.register_hook(fails_at(failing_row))
    budget = small.run.update(first, groups)["batch/max_tokens_per_row"]
    handle.remove()
    other = stepper(*words, "--max_tokens_per_row", str(int(budget)), *LONGER_ONES)
    other.run.update(first, groups)
    assert torch.equal(other.weights(), small.weights())
    other.run.config.train.max_tokens_per_row = small.run.config.train.max_tokens_per_row
    for each in (small, other):
        assert "batch/max_tokens_per_row" not in each.run.update(second, groups)
    assert torch.equal(other.weights(), small.weights())


@pytest.mark.parametrize("words", [(), ("--updates_per_batch", "2")], ids=["reference", "old log-probs"])
def test_log_probs_that_do_not_fit_are_asked_again_in_shorter_rows(
    stepper, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    small = stepper(*GRPO, *words)
    at = next(plan(small.run.phases))
    groups, log_probs, fails = small.groups(at), update.log_probs, fails_at(1)
    with monkeypatch.context() as patch:
        patch.setattr(update, "log_probs", lambda *of: fails() or log_probs(*of))
        metrics = small.run.update(at, groups)
    other = stepper(*GRPO, *words, "--max_tokens_per_row", str(int(metrics["batch/max_tokens_per_row"])), *LONGER_ONES)
    assert other.run.update(at, groups)["loss"] == metrics["loss"]
    assert torch.equal(other.weights(), small.weights())


def test_a_rollout_that_does_not_fit_ends_the_run(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "sample", lambda *_, **__: out_of_memory(torch.empty(0)))
    line = refused(trainer.flags(tmp_path / "run", "--phases", "tempsamp:1"))
    assert line.startswith("CUDA out of memory") and "max_tokens_per_row" in line and "num_generations" in line
    assert "OutOfMemoryError" in (tmp_path / "run/error.log").read_text()


def test_a_batch_that_fits_no_memory_ends_the_run(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, lambda call: out_of_memory)
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:1"))
    assert "out of memory in the update at max_tokens_per_row=" in line and "gradient_checkpointing" in line


def test_too_many_bad_videos_in_an_epoch_end_the_run(trainer, clips: Path, refused, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for number, clip in enumerate(sorted((clips / "videos").iterdir())):
        (videos / clip.name).write_bytes(clip.read_bytes() if number % 2 else b"no video")
    words = ("--phases", "sft:40", "--videos", str(videos), "--on_bad_video", "skip", "--max_bad_videos", "1")
    line = refused(trainer.flags(tmp_path / "run", *words))
    assert "epoch 0 has 2 bad videos (max_bad_videos=1)" in line and ".mp4" in line


def test_the_record_has_the_bad_videos_of_each_step(trainer, clips: Path, tmp_path: Path) -> None:
    """Each of the 6 samples once an epoch, 2 a step."""
    videos = shutil.copytree(clips / "videos", tmp_path / "videos")
    annotations = json.loads((clips / "annotations/train.json").read_text())
    bad = next(iter(annotations))
    (videos / f"{bad}.mp4").write_bytes(b"no video")
    num_samples = sum(len(each["sentences"]) for each in annotations.values())
    words = ("--phases", "sft:2epochs", "--videos", str(videos), "--on_bad_video", "skip")
    rows = trainer.main(tmp_path / "run", *words)
    epochs = [rows[: num_samples // 2], rows[num_samples // 2 :]]
    assert [sum(row["data/bad_videos"] for row in rows) for rows in epochs] == [len(annotations[bad]["sentences"])] * 2
    assert 0 in [row["data/bad_videos"] for row in rows]


def test_a_sampler_that_drifts_from_the_policy_is_seen_and_ends_the_run(stepper) -> None:
    small = stepper(*GRPO, "--updates_per_batch", "2", "--learning_rate", "1e-2", "--max_logp_gap", "0")
    first, second, _ = plan(small.run.phases)
    groups = small.groups(first)
    assert small.run.update(first, groups)["rollout/logp_gap"] < 1e-4
    groups = small.groups(second)
    for completion in (each for group in groups for each in group.completions if not each.is_off_policy):
        completion.sampled_logps += 0.5
    assert small.run.update(second, groups)["rollout/logp_gap"] == pytest.approx(0.5, abs=1e-4)
    groups = small.groups(second)
    for completion in (each for group in groups for each in group.completions if not each.is_off_policy):
        completion.sampled_logps += 0.5
    small.run.config.rollout.max_logp_gap = 0.4
    with pytest.raises(ValueError, match=r"rollout/logp_gap=0\.5 is above max_logp_gap=0\.4: .*weights do not reach"):
        small.run.update(second, groups)


def test_sigterm_saves_after_the_step_and_the_run_goes_on_as_if_nothing_was(
    trainer, finished_run, without_times, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, update_ = tmp_path / "run", Run.update

    def asked_to_stop(run: Run, at: Any, groups: Any) -> Any:
        if at.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update_(run, at, groups)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", asked_to_stop)
        trainer.main(folder, *finished_run.words, "--save_steps", "0")
    assert latest_checkpoint(folder)[1] == 4 and read_metrics(folder)[-1]["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    main(["--resume", str(folder)])
    assert without_times(read_metrics(folder)) == without_times(finished_run.rows)

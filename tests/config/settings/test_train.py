"""Settings of the run off their defaults: its plan, its rows, its optimizer, its records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast import train as train_module
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.evaluation.asking import answer_row
from tempsamp_fast.learning import update as update_module
from tempsamp_fast.run import results as results_module
from tempsamp_fast.run import run as run_module
from tempsamp_fast.run.checkpoint import best_checkpoint, checkpoints
from tempsamp_fast.run.results import Results
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan

SHORT = ("--phases", "sft:1")


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_module, "describe_plan", lambda config, ranks: f"{config.train.phases} on {ranks}")
    train_module.main(trainer.flags(tmp_path / "run", *SHORT, "--dry_run"))
    assert capsys.readouterr().out == "sft:1 on 1\n" and not (tmp_path / "run").exists()


def test_the_run_is_where_it_is_asked_to_be(stepper: Callable, tmp_path: Path, trainer) -> None:
    """Of the launcher's rank nothing is read: the process group knows it."""
    run = trainer.run(tmp_path / "there", *SHORT, "--local_rank", "3")
    assert run.folder == tmp_path / "there" and run.folder.is_dir() and run.rank == 0


def test_another_seed_asks_in_another_order(stepper: Callable) -> None:
    orders = []
    for seed in ("0", "0", "1"):
        run = stepper("--phases", "sft:3", "--seed", seed).run
        orders.append([prompt.sample.sample_id for at in plan(run.phases) for prompt in run.prompts(at)])
    assert orders[0] == orders[1] != orders[2]


def test_another_seed_draws_other_adapters(stepper: Callable) -> None:
    weights = []
    for seed in ("0", "1"):
        model = stepper(*SHORT, "--lora_rank", "2", "--lora_targets", "q_proj", "--seed", seed).run.policy.model
        weights.append(next(tensor for name, tensor in model.named_parameters() if "lora_A" in name))
    assert not weights[0].equal(weights[1])


class StopHere(Exception):
    """Raised where a step would begin."""


def num_prompts(row: Any) -> int:
    """A tree has a node for each of its questions, or is a single one."""
    return sum(max(1, sum(len(node.path) == 1 and not node.is_leaf for node in tree.nodes)) for tree in row.layout)


def rows_of(one: Any, monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """The rows of every step of the plan, which is not taken."""
    found: list[list] = []

    def note(engine: Any, rows: list, *_: Any) -> Any:
        found.append(rows)
        raise StopHere

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "optimizer_step", note)
        patch.setattr(one.run, "sample", lambda prompts, counts, *_, **__: [
            [one.run.chat.completion(one.run.chat.encode("no " * (1 + index))) for index in range(count)]
            for count in counts
        ])  # fmt: skip
        for at in plan(one.run.phases):
            with pytest.raises(StopHere):
                one.run.update(at, one.groups(at))
    return found


@pytest.mark.parametrize(
    ("words", "sft", "tempsamp"),
    [
        ((), [1, 1], [1, 1]),
        (("--prompts_per_device", "3"), [3, 3], [3, 3]),
        (("--prompts_per_device", "2", "--sft_prompts_per_device", "3"), [3, 3], [2, 2]),
        (("--gradient_accumulation_steps", "3"), [1, 1, 1], [1, 1, 1]),
        (("--packing", "none", "--prompts_per_device", "2"), [2, 2], [6, 6]),
    ],
    ids=str,
)
def test_a_step_has_the_rows_asked_for(
    stepper: Callable, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], sft: list[int], tempsamp: list[int]
) -> None:
    """Row after row the number of its groups: all prompts of a micro-step share one."""
    one = stepper("--phases", "sft:1,tempsamp:1", "--beta", "0.1", "--shaping", "anchor", *words)
    monkeypatch.setattr(update_module, "_log_probs", lambda *_: None)
    monkeypatch.setattr(Run, "_build_reference", lambda *_, **__: object())
    found = rows_of(one, monkeypatch)
    assert [[num_prompts(row) for row in rows] for rows in found] == [sft, tempsamp]


def test_rows_and_prefill_passes_keep_the_budget_asked_for(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stepper(*SHORT, "--prompts_per_device", "4", "--gradient_accumulation_steps", "1")
    ((row,),) = rows_of(one, monkeypatch)
    budget = row.num_tokens - 1
    less = stepper(
        *SHORT, "--prompts_per_device", "4", "--gradient_accumulation_steps", "1", "--max_tokens_per_row", str(budget)
    )
    ((first, second),) = rows_of(less, monkeypatch)
    assert (num_prompts(first), num_prompts(second)) == (3, 1)
    assert less.run.backend._options["max_tokens_per_row"] == budget


def test_every_step_has_the_rate_of_its_schedule(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up over half of a phase, then down to a tenth; a phase's own peak wins."""
    rates: list[float] = []
    update = lambda engine, reference, groups, method, config, per_row, rate, watch, sequence_group: (
        rates.append(rate) or {"optim/grad_norm": 0.0}
    )
    monkeypatch.setattr(run_module, "update", update)
    words = ("--learning_rate", "8e-3", "--warmup_ratio", "0.5", "--lr_schedule", "linear")
    run = stepper("--phases", "sft:4,sft:4@4e-3", *words).run
    for at in plan(run.phases):
        run.update(at, [])
    assert rates == pytest.approx([4e-3, 8e-3, 8e-3, 4.4e-3, 2e-3, 4e-3, 4e-3, 2.2e-3])


def test_the_optimizer_is_made_as_asked_for(stepper: Callable) -> None:
    run = stepper(*SHORT, "--weight_decay", "0.3", "--adam_beta2", "0.5", "--max_grad_norm", "0.25").run
    groups = run.engine.optimizer.param_groups
    assert {(group["weight_decay"], *group["betas"]) for group in groups} == {(0.3, 0.9, 0.5)}
    assert run.engine.gradient_clipping() == 0.25


def test_weights_decay_by_the_rate_and_the_decay_asked_for(stepper: Callable) -> None:
    """AdamW moves a weight w without gradient by -rate * decay * w."""
    one = stepper(*SHORT, "--weight_decay", "10", "--learning_rate", "1e-3")
    start = one.weights()
    for parameter in one.run.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    one.run.engine.optimizer.step()
    torch.testing.assert_close(one.weights(), 0.99 * start)


@pytest.mark.parametrize(
    ("words", "stage", "offload"),
    [
        (("--zero_stage", "1"), 1, "none"),
        (("--zero_stage", "2", "--offload", "optimizer"), 2, "cpu"),
        (("--deepspeed_config", "zero2"), 2, "none"),
    ],
)
def test_optimizer_state_lies_where_asked_for(
    stepper: Callable, words: tuple[str, ...], stage: int, offload: str
) -> None:
    engine = stepper(*SHORT, *words).run.engine
    assert engine.zero_optimization_stage() == stage
    device = engine.zero_offload_optimizer()
    assert ("none" if device is None else str(getattr(device.device, "value", device.device))) == offload


def test_evaluations_are_in_the_modes_and_batches_asked_for(
    stepper: Callable, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ("--eval_annotations", str(clips / "annotations/test.json"), "--max_eval_samples", "3")
    run = stepper(*SHORT, *held_out, "--eval_modes", "think+answer", "--eval_batch_size", "2").run
    asked: list[tuple[int, str]] = []

    def evaluate(samples: list, mode: str, sampler: Any, loader: Any, batch_size: int, *_: Any, **__: Any) -> list:
        asked.append((len(samples), mode, batch_size))
        return [answer_row(sample, "") for sample in samples]

    monkeypatch.setattr(results_module, "evaluate", evaluate)
    with run.log() as log:
        Results(run).evaluate("start", 0, log)
    assert asked == [(3, "think", 2), (3, "answer", 2)]
    assert sorted(path.name for path in (run.folder / "eval").iterdir()) == ["start_answer.jsonl", "start_think.jsonl"]


def test_as_many_checkpoints_stay_as_asked_for_saved_as_often_as_asked_for(stepper: Callable) -> None:
    run = stepper("--phases", "sft:7", "--save_steps", "3", "--keep_checkpoints", "1").run
    saves = [at.step + 1 for at in plan(run.phases) if run.is_save_step(at)]
    assert saves == [3, 6]
    for num_steps in saves:
        run.save(num_steps)
        run.saving.finish()
        assert [path.name for path in checkpoints(run.folder)] == [f"step_{num_steps:06d}"]
    assert not any(stepper(*SHORT).run.is_save_step(at) for at in plan(run.phases))


def test_patience_is_as_asked_for(stepper: Callable) -> None:
    run = stepper(*SHORT, "--stall_timeout_s", "7", "--stop_grace_s", "3", "--max_skipped_steps", "4").run
    assert (run.heartbeat.timeout_s, run.graceful_stop.grace_s, run.skipped_steps.max_in_a_row) == (7, 3, 4)


def test_a_resumed_run_is_the_one_asked_for(stepper: Callable) -> None:
    run = stepper(*SHORT).run
    with run.log():
        run.save(1)
        run.saving.finish()
    with pytest.raises(ValueError, match=r"output_dir='elsewhere': --resume goes on in .*; leave it out"):
        parse_args(["--resume", str(run.folder), "--output_dir", "elsewhere"])
    resumed = Run(parse_args(["--resume", str(run.folder), "--output_dir", str(run.folder)]))
    assert resumed.folder == run.folder and resumed.first_step == 1
    assert resumed.resumed_from == checkpoints(run.folder)[-1]


def test_the_start_is_evaluated_unless_told_otherwise(trainer: Any, clips: Path, tmp_path: Path) -> None:
    words = ("--phases", "sft:1", "--max_eval_samples", "1", "--eval_annotations", str(clips / "annotations/test.json"))
    stages = []
    for name, more in (("with", ()), ("without", ("--eval_start", "no"))):
        trainer.main(tmp_path / name, *words, *more)
        stages.append([row["stage"] for row in json.loads((tmp_path / name / "results.json").read_text())])
    assert stages == [["start", "1_sft/answer"], ["1_sft/answer"]]


def test_evaluations_come_as_often_as_asked_for_and_the_best_checkpoint_stays(
    trainer: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the newest; a resumed run goes on from the best value so far, and of equal ones the first stays.

    The fifth value is the constant span's.
    """
    values = iter([0.1, 0.5, 0.3, 0.2, 0.0, 0.5, 0.6])
    monkeypatch.setattr(results_module, "score_rows", lambda *_: {"miou": next(values, 0.0), "parse_rate": 1.0})
    held_out = ("--eval_annotations", str(clips / "annotations/test.json"), "--max_eval_samples", "1")
    words = ("--eval_steps", "1", "--best_metric", "miou", "--keep_checkpoints", "1", "--eval_start", "no", *held_out)
    folder = tmp_path / "run"
    rows = trainer.main(folder, "--phases", "sft:4", *words)
    assert [row["step"] for row in rows if row["phase"] == "eval"] == [1, 2, 3, 4]
    assert [path.name for path in checkpoints(folder)] == ["step_000002", "step_000004"]
    assert best_checkpoint(folder) == checkpoints(folder)[0]
    assert len(list((folder / "eval/steps").iterdir())) == 3 and len(list((folder / "eval").glob("*.jsonl"))) == 1
    train_module.main(["--resume", str(folder), "--phases", "sft:6"])
    assert best_checkpoint(folder) == checkpoints(folder)[-1] == folder / "checkpoints/step_000006"
    assert len(checkpoints(folder)) == 1


@pytest.mark.parametrize(
    ("metric", "named"),
    [("miuo", "choose from miou.*did you mean 'miou'"), ("hl_map", "choose from miou"), ("think/miou", "a mode of")],
)
def test_a_metric_that_is_none_is_named(
    trainer: Any, clips: Path, tmp_path: Path, metric: str, named: str, refused: Callable
) -> None:
    held_out = ("--eval_annotations", str(clips / "annotations/test.json"), "--max_eval_samples", "1")
    words = ("--phases", "sft:1", *held_out, "--best_metric", metric)
    assert re.search(f"^best_metric.*{named}", refused(trainer.flags(tmp_path / "run", *words)))


def test_as_many_answers_are_kept_and_shown_as_asked_for(trainer: Any, tmp_path: Path, caplog) -> None:
    words = ("--phases", "tempsamp:3", "--gradient_accumulation_steps", "3", "--show_completions", "2")
    with caplog.at_level("INFO"):
        trainer.main(tmp_path / "run", *words, "--log_completions", "2")
    rows = [json.loads(line) for line in (tmp_path / "run/groups.jsonl").read_text().splitlines()]
    kept = [row for row in rows if "texts" in row]
    assert [row["step"] for row in rows] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["step"] for row in kept] == [0, 0, 1, 1, 2, 2]
    assert all(len(row["texts"]) == len(row["advantages"]) and row["query"] and row["mode"] == "answer" for row in kept)
    shown = [record.getMessage() for record in caplog.records if "true" in record.getMessage()]
    assert [text.partition(":")[0] for text in shown] == ["tempsamp/answer, step 0", "tempsamp/answer, step 2"]
    assert all(len(line) <= 80 for text in shown for line in text.splitlines())

"""Evaluations of a run: what reaches them, what of them a resumed run keeps, and the baseline that never looks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.evaluation.asking import answer_row
from tempsamp_fast.run import results
from tempsamp_fast.run.checkpoint import best_checkpoint, checkpoints, model_folder, step_of
from tempsamp_fast.run.results import Results
from tempsamp_fast.sample import Sample


def samples(*windows: tuple[float, float]) -> list[Sample]:
    return [Sample(f"s{n}", Path("v.mp4"), "query", 10.0, (window,)) for n, window in enumerate(windows)]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """As much of a run as its results look at: it learned from early spans and is tested on late ones."""
    words = ["--require_tags", "false", "--eval_modes", "answer+think", "--eval_batch_size", "3"]
    config = parse_args([*words, "--output_dir", str(tmp_path)])
    learned, held_out = samples((0.0, 2.0), (0.0, 2.0)), samples((6.0, 9.0), (6.0, 9.0))
    shared: dict[str, Any] = {"config": config, "folder": tmp_path, "rank": 0, "greedy": None, "loader": None}
    shared |= {"phases": [], "is_stopping": lambda: False}
    return SimpleNamespace(**shared, first_step=4, train_samples=learned, eval_samples=held_out)


def test_the_settings_of_an_evaluation_reach_it(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untagged answers count where tags are not required, in the record as in the scores."""
    asked = []

    def evaluate(eval_samples, mode, sampler, loader, batch_size, require_tags=True, answer_form="text", **_):
        asked.append((mode, batch_size, require_tags))
        return [answer_row(sample, "6 to 9", require_tags) for sample in eval_samples]

    monkeypatch.setattr(results, "evaluate", evaluate)
    log = SimpleNamespace(log=lambda *_, **__: None)
    found = Results(run)
    found.evaluate("1_sft/answer", 4, log)  # type: ignore[arg-type]
    assert asked == [("answer", 3, False), ("think", 3, False)]
    assert [row["miou"] for row in found.rows] == [1.0, 1.0]
    rows = [json.loads(line) for line in found.answers_path("1_sft/answer", "think").read_text().splitlines()]
    assert [row["span"] for row in rows] == [[6.0, 9.0]] * 2


@pytest.mark.parametrize(("every", "stages"), [(2, ["step 4"] * 2), (3, []), (0, [])])
def test_an_evaluation_between_phases_that_was_stopped_is_made_up_for(
    run, monkeypatch: pytest.MonkeyPatch, every: int, stages: list[str]
) -> None:
    """In both modes, where the run goes on after a step that is to be evaluated."""
    monkeypatch.setattr(results, "evaluate", lambda asked, *_, **__: [answer_row(each, "") for each in asked])
    run.config.train.eval_steps = every
    found = Results(run)
    found.make_up(SimpleNamespace(log=lambda *_, **__: None))  # type: ignore[arg-type]
    assert [row["stage"] for row in found.rows] == stages


def test_weights_are_the_best_though_the_start_was_better(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none after them that are no better."""
    texts = iter(["6 to 9", "0 to 8", "0 to 8", "0 to 7"])
    run.config.train.eval_modes = "answer"
    monkeypatch.setattr(results, "evaluate", lambda asked, *_, **__: [answer_row(asked[0], next(texts), False)] * 2)
    log: Any = SimpleNamespace(log=lambda *_, **__: None)
    found = Results(run)
    assert [found.evaluate(f"step {step}", step, log) for step in range(4)] == [False, True, False, False]


def test_an_evaluation_counts_what_was_skipped_and_what_lies_outside(run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, float] = {}
    log: Any = SimpleNamespace(log=lambda step, phase, metrics, **_: logged.update(metrics))
    skipped = {"skipped": True}
    answers = lambda asked, *_, **__: [answer_row(asked[0], "6 to 99", False), answer_row(asked[1], "") | skipped]
    monkeypatch.setattr(results, "evaluate", answers)
    found = Results(run)
    found.evaluate("start", 0, log)
    assert [row["num_skipped"] for row in found.rows] == [1, 1]
    assert (logged["eval/answer/outside_video"], logged["eval/think/outside_video"]) == (1, 1)


def test_a_resumed_run_keeps_the_evaluations_up_to_its_checkpoint(run) -> None:
    rows = [{"stage": str(step), "mode": "answer", "num_steps": step} for step in (0, 4, 5)]
    (run.folder / "results.json").write_text(json.dumps(rows))
    assert [row["num_steps"] for row in Results(run).rows] == [0, 4]
    run.first_step = 0
    assert Results(run).rows == []


def test_the_constant_baseline_has_seen_the_training_samples_alone(run) -> None:
    baseline = Results(run).constant_baseline()
    assert baseline["miou"] == 0.0 and baseline["stage"] == "constant 0.0-2.0 s"


@pytest.mark.parametrize("keep_best", ["yes", "no"])
def test_the_checkpoint_of_the_best_evaluation_stays_if_asked_for(stepper, keep_best: str) -> None:
    """In the mean of its modes, by the first score; of equal ones the newest. `RUN/best` is its model."""
    words = "--eval_modes", "answer+think", "--keep_checkpoints", "1", "--keep_best", keep_best
    run = stepper("--phases", "sft:9", *words).run
    with pytest.raises(ValueError, match="no checkpoint of this run was evaluated"):
        (run.folder / "checkpoints").mkdir()
        model_folder(f"{run.folder}/best")
    with run.log():
        pass
    rows: list[dict[str, Any]] = [{"stage": "start", "mode": "answer", "num_steps": 0, "miou": 0.9, "r1@0.3": 0.0}]
    stopped_before_think: tuple[float, ...] = (0.99,)
    scored = [(0.1, 0.1), (0.6, 0.4), (0.7, 0.1), (0.3, 0.7), stopped_before_think]
    for num_steps, mious in enumerate(scored, start=1):
        for mode, miou in zip(("answer", "think"), mious, strict=False):
            rows.append({"stage": "x", "mode": mode, "num_steps": num_steps, "miou": miou, "r1@0.3": 1 / num_steps})
        (run.folder / "results.json").write_text(json.dumps(rows))
        run.save(num_steps)
        run.saving.finish()
    assert [step_of(each) for each in checkpoints(run.folder)] == ([4, 5] if keep_best == "yes" else [5])
    if keep_best == "yes":
        found = Path(model_folder(f"{run.folder}/best"))
        assert (step_of(found.parent), found.name) == (4, "model")
    else:
        with pytest.raises(ValueError, match="no checkpoint of this run was evaluated"):
            model_folder(f"{run.folder}/best")


@pytest.mark.parametrize(
    ("metric", "best"),
    [(None, 2), ("miou", 2), ("answer/miou", 1), ("r1@0.5", 1), ("answer/r1@0.5", 2), ("think/r1@0.5", 1)],
)
def test_the_best_is_so_by_the_metric_and_in_the_mode_of_the_run(tmp_path: Path, metric: str | None, best: int) -> None:
    """Without a mode in the mean of both, without a name by the first score."""
    scored = {(1, "answer"): (0.6, 0.2), (1, "think"): (0.2, 0.9), (2, "answer"): (0.5, 0.4), (2, "think"): (0.4, 0.1)}
    rows = [
        {"stage": "x", "mode": mode, "num_steps": step, "miou": miou, "r1@0.5": recall}
        for (step, mode), (miou, recall) in scored.items()
    ]
    (tmp_path / "results.json").write_text(json.dumps(rows))
    train = {"best_metric": metric, "eval_modes": "answer+think"}
    (tmp_path / "config.json").write_text(json.dumps({"train": train}))
    for step in (1, 2):
        folder = tmp_path / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    found = best_checkpoint(tmp_path)
    assert found is not None and step_of(found) == best


@pytest.mark.parametrize(
    "text", ["3", "[3]", '[{"num_steps": []}]', '[{"num_steps": 1, "stage": 1, "mode": "x", "miou": "y"}]', "[[]]"]
)
def test_evaluations_that_no_run_writes_are_named(run, text: str) -> None:
    (run.folder / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json: the evaluations so far cannot be read"):
        Results(run)

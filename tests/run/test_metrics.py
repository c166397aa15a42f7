"""What the record of a step says: nothing that was not measured, and what tells that nothing is learned."""

from __future__ import annotations

import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.evaluation.asking import evaluate
from tempsamp_fast.infer import main as infer_main
from tempsamp_fast.learning.advantage import advantage_metrics, assign_advantages
from tempsamp_fast.learning.groups import reward_metrics
from tempsamp_fast.learning.metrics import combine, logp_gap, mean_over_ranks, number_per_rank
from tempsamp_fast.rollout.token_sampling import SamplingParams, choose_tokens
from tempsamp_fast.run.log import ZERO_STEPS, RunLog
from tempsamp_fast.run.results import table
from tempsamp_fast.system import progress
from tempsamp_fast.system.progress import BAR, Progress

SHORT = ("--max_completion_length", "4")


def answer(reward: float, length: int = 3, *, is_cut: bool = False, is_off_policy: bool = False) -> Completion:
    return Completion(torch.ones(length, dtype=torch.int64), "", is_off_policy, rewards={"tiou": reward}, is_cut=is_cut)


def group(*answers: Completion) -> RolloutGroup:
    return RolloutGroup(None, list(answers))  # type: ignore[arg-type]


def test_lengths_are_those_of_sampled_answers() -> None:
    true = answer(1.0, 100, is_off_policy=True)
    metrics = reward_metrics([group(answer(0.0, 2), answer(0.5, 6, is_cut=True), true), group(answer(0, 4), true)])
    assert metrics["completion/mean_length"] == 4 and metrics["completion/cut_share"] == pytest.approx(1 / 3)
    assert (metrics["completion/min_length"], metrics["completion/max_length"]) == (2, 6)
    supervised = RolloutGroup(None, [Completion(torch.ones(2, dtype=torch.int64), "", is_off_policy=True)])  # type: ignore[arg-type]
    assert reward_metrics([supervised]) == {}


def test_ties_and_the_spread_of_rewards_are_told() -> None:
    tied, untied = group(answer(0.5), answer(0.5)), group(answer(0.0), answer(1.0))
    lifted = group(answer(0.0), answer(0.0), answer(1.0, is_off_policy=True))
    for groups, share, std in (([tied], 1, 0), ([untied], 0, 0.5), ([tied, untied, lifted, tied], 0.5, 0.125)):
        metrics = reward_metrics(groups)
        assert metrics["reward/tied_groups"] == share and metrics["reward/std"] == pytest.approx(std)


@pytest.mark.parametrize(("true", "flipped"), [(1.0, 0.5), (0.0, 0.0)])
def test_sampled_positives_that_turn_negative_are_counted(true: float, flipped: float) -> None:
    """0.5 is above the mean of 0.1, 0.2, 0.5 and 0.9 and below that of the group with a true answer of 1."""
    algorithm = AlgorithmConfig(shaping="mixed")
    groups = [group(*map(answer, (0.1, 0.2, 0.5, 0.9)), answer(true, is_off_policy=True))]
    assign_advantages(groups, "tempsamp", algorithm)
    metrics = advantage_metrics(groups, algorithm)
    assert metrics["advantage/flipped"] == flipped
    assert (metrics["advantage/groups_flipped"], metrics["advantage/groups_lost"]) == (float(flipped > 0), 0)
    none_above = group(*map(answer, (0.1, 0.1, 0.3)), answer(1.0, is_off_policy=True))
    groups += [none_above, group(answer(0.3), answer(0.3), answer(1.0, is_off_policy=True))]
    assign_advantages(groups, "tempsamp", algorithm)
    metrics = advantage_metrics(groups, algorithm)
    assert (metrics["advantage/groups_flipped"], metrics["advantage/groups_lost"]) == (
        (float(flipped > 0) + 1) / 2,
        0.5,
    )


def test_without_sampled_positives_none_is_said_to_flip() -> None:
    algorithm = AlgorithmConfig(shaping="mixed")
    groups = [group(answer(0.3), answer(0.3), answer(1.0, is_off_policy=True))]
    assign_advantages(groups, "tempsamp", algorithm)
    assert "advantage/flipped" not in advantage_metrics(groups, algorithm)


def test_extremes_of_ranks_stay_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [
        (1, {"completion/min_length": 2.0, "completion/max_length": 5.0}),
        (3, {"completion/max_length": 9.0, "loss": 1.0}),
    ]
    monkeypatch.setattr("tempsamp_fast.learning.metrics.of_all_ranks", lambda own: lengths)
    assert mean_over_ranks({}, 1) == {"completion/min_length": 2, "completion/max_length": 9, "loss": 1}


def test_figures_of_rows_become_means_over_tokens_and_losses_add_up() -> None:
    """A side of one row alone has that row's mean."""
    rows = [
        {"loss": 1.0, "num_tokens": 1.0, "kl": 0.0, "ratio_max": 1.5},
        {"loss": 2.0, "num_tokens": 3.0, "kl": 1.0, "ratio_max": 1.25, "off/num_tokens": 2.0, "off/kl": 5.0},
    ]
    expected = {"loss": 3, "policy/num_tokens": 4, "policy/kl": 0.75, "policy/ratio_max": 1.5}
    assert combine(rows) == expected | {"policy/off/num_tokens": 2, "policy/off/kl": 5}


@pytest.mark.parametrize("name", ["reward/tiou", "completion/cut_share", "advantage/flipped", "batch/skipped_share"])
def test_means_over_groups_weigh_ranks_by_their_groups(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Prompts are shared out by their tokens: one rank may have one long one, another three."""
    parts = [(1, {name: 0.0, "time/step_s": 1.0}), (3, {name: 1.0, "time/step_s": 2.0})]
    monkeypatch.setattr("tempsamp_fast.learning.metrics.of_all_ranks", lambda own: parts)
    assert mean_over_ranks({}, 1) == {name: 0.75, "time/step_s": 1.5}


def test_a_count_is_the_mean_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempsamp_fast.learning.metrics.num_ranks", lambda: 4)
    monkeypatch.setattr("tempsamp_fast.learning.metrics.dist.all_reduce", lambda total: total.add_(9))
    assert number_per_rank(3, torch.device("cpu")) == 3


def test_a_sampler_that_drifts_on_another_rank_ends_the_run_on_this_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempsamp_fast.learning.metrics.of_all_ranks", lambda own: [own, 0.9])
    same = Completion(torch.ones(2, dtype=torch.int64), "", sampled_logps=torch.full((2,), -1.0))
    assert logp_gap([torch.full((2,), -1.0)], [same], limit=1.0) == {"rollout/logp_gap": 0.0}
    with pytest.raises(ValueError, match=r"rollout/logp_gap=0\.9 is above max_logp_gap=0\.4"):
        logp_gap([torch.full((2,), -1.0)], [same], limit=0.4)


def test_a_kl_that_is_not_computed_is_not_in_the_record(finished_run, trainer, tmp_path: Path) -> None:
    """Supervised steps have none, nor has reinforcement without a reference."""
    by_phase = {row["phase"]: row for row in finished_run.rows}
    assert "policy/kl" in by_phase["tempsamp/answer"]
    assert not [name for name in by_phase["sft/answer"] if name.endswith("kl") or name.startswith("completion/")]
    rows = trainer.main(tmp_path / "run", "--phases", "tempsamp:1", "--beta", "0", "--rewards", "tiou=3")
    assert not [name for name in rows[0] if name.endswith("kl")]
    assert {"reward/std", "reward/tied_groups", "completion/cut_share", "completion/max_length"} <= rows[0].keys()
    assert rows[0]["reward/off_policy_mean"] == pytest.approx(3)


def test_epochs_count_on_through_the_phases(finished_run) -> None:
    """2 prompts a step."""
    steps = [row for row in finished_run.rows if row["phase"] != "eval"]
    per_step = steps[0]["data/epoch"]
    assert [row["data/epoch"] for row in steps] == pytest.approx([per_step * (n + 1) for n in range(5)])
    assert 2 / per_step == pytest.approx(round(2 / per_step))


@pytest.fixture
def log(tmp_path: Path, trainer) -> RunLog:
    return RunLog(tmp_path, parse_args(trainer.flags(tmp_path)), 100, 0, active=True)


def test_steps_without_any_reward_are_warned_about_once(log: RunLog, caplog: pytest.LogCaptureFixture) -> None:
    for step, reward in enumerate([0.0] * (ZERO_STEPS - 1) + [0.1] + [0.0] * 3 * ZERO_STEPS):
        log.log(step, "grpo/answer", {"reward/on_policy_mean": reward})
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and "max_completion_length" in warned[0] and f"step {2 * ZERO_STEPS - 1}" in warned[0]


def test_ranks_but_the_first_keep_no_record(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", parse_args([]), 1, 0, active=False) as log:
        log.log(0, "grpo/answer", {"loss": 1.0})
        log.log_groups(0, "grpo/answer", [group(answer(0.0), answer(1.0))])
    assert not (tmp_path / "run").exists()


def test_a_line_of_piped_output_has_total_clock_and_time_left(log: RunLog, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log.log(0, "sft/answer", {"loss": 1.25, "reward/tiou": 0.5, "time/step_s": 2.0, "perf/tokens_per_s": 1234.0})
    (line,) = (record.getMessage() for record in caplog.records if "loss" in record.getMessage())
    assert "sft/answer 1/100" in line and "loss 1.25" in line and line.endswith(" left") and len(line) <= 80
    assert len(line.split()[0].split(":")) == 3


def test_at_80_columns_the_bar_is_a_bar() -> None:
    line = tqdm.format_meter(
        123,
        4567,
        4000.0,
        ncols=80,
        prefix="tempsamp/answer+think",
        postfix="reward=0.512, loss=-1.2e-05",
        bar_format=BAR,
    )
    assert len(line) <= 80 and len(line.split("|")[1]) == 10 and "123/4567" in line and "reward=0.512" in line


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_bar_has_as_many_figures_as_fit(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "columns", lambda: width)
    monkeypatch.setattr(
        progress, "tqdm", lambda **options: tqdm(**options | {"dynamic_ncols": False}, file=terminal, ncols=width)
    )
    with Progress(4567, 4566) as bar:
        bar.update("tempsamp/answer+think", {f"figure{number}": -1.23456e-05 for number in range(9)})
        bar._bar.refresh()
        line = terminal.getvalue().split("\r")[-1]
    assert len(line.rstrip("\n")) <= width and "4567/4567" in line
    assert line.count("figure") == {80: 0, 120: 3, 200: 7}[width]


def test_a_piped_line_of_any_label_fits_80_columns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Progress(4567, 4000).update("tempsamp/answer+think", {f"figure{number}": -1.23456e-05 for number in range(9)})
    (line,) = (record.getMessage() for record in caplog.records)
    assert 60 < len(line) <= 80 and line.count("figure") == 1 and line.endswith(" left")


def test_time_left_is_told_once_something_is_done_and_the_end_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress(4) as bar:
        bar.update("steps", {}, by=0)
        bar.update("steps", {}, by=1)
        bar.every_s = 60.0
        for by in (3, 0, 0):
            bar.update("steps", {}, by=by)
    first, second, last = (record.getMessage() for record in caplog.records)
    assert first.endswith(" steps 0/4") and second.endswith(" left") and last.endswith(" steps 4/4, 0:00:00 left")


def test_log_lines_do_not_run_into_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options, file=terminal, ncols=80))
    handler, root = logging.StreamHandler(terminal), logging.getLogger()
    monkeypatch.setattr("sys.stderr", terminal)
    handler.setStream(terminal)
    root.addHandler(handler)
    try:
        with Progress(3) as bar:
            bar.update("sft", {"loss": 1.0})
            logging.getLogger("tempsamp_fast").warning("a line of the log")
    finally:
        root.removeHandler(handler)
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert [line.strip() for line in lines if "a line of the log" in line] == ["a line of the log"]


def test_progress_of_an_evaluation_and_its_scores_are_told_at_once(
    trainer, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`eval_start no` leaves out the one before the first step."""
    words = ("--phases", "sft:2", "--max_eval_samples", "2", "--eval_annotations", str(clips / "annotations/test.json"))
    with caplog.at_level(logging.INFO):
        rows = trainer.main(tmp_path / "run", *words, "--eval_start", "no")
    assert [row["phase"] for row in rows] == ["sft/answer", "sft/answer", "eval"]
    text = caplog.text
    assert text.index("sft/answer 2/2") < text.index("evaluation/answer 2/2") < text.index("1_sft/answer")
    assert "miou" in text


def test_skipped_queries_are_counted_in_the_table(trainer, tmp_path: Path) -> None:
    run = trainer.run(tmp_path / "run", "--phases", "sft:1", "--on_bad_sample", "skip")
    run.loader.max_prompt_tokens = 10
    rows = evaluate(run.train_samples[:2], "answer", run.greedy, run.loader, batch_size=2)
    assert [row.get("skipped") for row in rows] == [True, True]
    scored = {"stage": "start", "mode": "answer", "num_steps": 0, "miou": 0.0, "num_skipped": 2}
    assert table([scored], 2).splitlines()[-1].endswith("2 skipped, counted as not read")
    assert "skipped" not in table([scored | {"num_skipped": 0}], 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_is_drawn_from_logits_that_are_not_finite_only_with_a_log_prob_that_says_so(
    bad: float, temperature: float
) -> None:
    logits = torch.randn(2, 5)
    logits[1, 2] = bad
    tokens, logps = choose_tokens(logits, SamplingParams(temperature), torch.tensor([0.5, 0.9]).double())
    assert tokens.max() < 5 and logps[0].isfinite() and logps[1].isnan()


@pytest.fixture(scope="module")
def broken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a weight of NaN."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("broken") / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.0" in name and "visual" not in name)
    weights[name] = weights[name].clone().fill_(math.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("phases", ["sft:3", "grpo:1", "sft:1,sft:1"])
def test_a_run_on_weights_of_nan_does_not_pass(trainer, broken: Path, refused, tmp_path: Path, phases: str) -> None:
    """Though fewer steps are skipped than `max_skipped_steps`; nothing is saved."""
    line = refused(trainer.flags(tmp_path / "run", "--phases", phases, "--model", str(broken), "--save_steps", "1"))
    assert "not finite" in line and "NaN" in line
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_inference_on_weights_of_nan_says_so(broken: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = next((clips / "videos").glob("*.mp4"))
    capsys.readouterr()
    assert infer_main(["--model", str(broken), "--video", str(video), "--query", "a square", *SHORT]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "logits are not finite" in said.err and json.dumps(said.err).count("error: ") == 1

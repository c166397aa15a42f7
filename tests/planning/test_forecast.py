"""Step times expected from a results file of bench/gpu.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.model.architectures import model_config
from tempsamp_fast.plan import main
from tempsamp_fast.planning.estimate import update_flops, work_of
from tempsamp_fast.planning.forecast import forecast, read_measured

RECIPE = ["--config", "charades_qwen2_5_vl_7b", "--beta", "0.04", "--gradient_checkpointing", "false"]
UPDATE = [
    {"label": "3B C=32 G=8 packed", "ms": 500.0, "tflop": 100.0, "mfu": 0.2},
    {"label": "3B C=32 G=8 unpacked", "ms": 5000.0, "tflop": 800.0, "mfu": 0.16},
    {"label": "7B C=32 G=8 packed", "ms": 1000.0, "tflop": 400.0, "mfu": 0.4},
    {"label": "7B C=32 G=8 recomputed packed", "ms": 2000.0, "tflop": 400.0, "mfu": 0.2},
    {"label": "7B C=256 G=8", "skipped": "takes about 90 GiB by arithmetic, and this GPU has 80"},
]
ROLLOUT = [
    {"label": "1 prompts ours", "ms": 4000.0, "rollouts_per_s": 2.0, "tokens_per_s": 256.0},
    {"label": "8 prompts ours", "ms": 8000.0, "rollouts_per_s": 8.0, "tokens_per_s": 1024.0},
    {"label": "8 prompts ours, graphs", "ms": 2000.0, "rollouts_per_s": 32.0, "tokens_per_s": 4096.0},
    {"label": "8 prompts generate", "ms": 9000.0, "rollouts_per_s": 7.1, "tokens_per_s": 910.0},
    {"label": "text, 8 prompts ours", "ms": 1000.0, "rollouts_per_s": 64.0, "tokens_per_s": 8192.0},
]


def write(file: Path, **rows: list[dict[str, Any]]) -> Path:
    sections = {name: {"rows": each, "error": None} for name, each in rows.items()}
    file.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3", "sections": sections}))
    return file


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write(tmp_path / "h100.json", update=UPDATE, rollout=ROLLOUT)


def test_an_update_runs_at_the_measured_rate_and_sampling_at_the_measured_pace(results: Path) -> None:
    """Ten times as many answers as were measured at most take ten times as long, half as long ones half as long."""
    config = parse_args([*RECIPE, "--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--cuda_graphs", "false"])
    shape = model_config(config.model)
    work = work_of((16, 28, 32), shape, "grpo", 8, 64)
    measured = read_measured(results)
    one = forecast(measured, work, shape, config, "grpo", 1)
    assert one.labels == ("3B C=32 G=8 packed", "1 prompts ours")
    assert one.update_s == pytest.approx(update_flops(work, shape, config.algorithm, "grpo", 1) / 200e12)
    assert one.sampling_s == pytest.approx(4.0 / 2)
    eighty = forecast(measured, work, shape, config, "grpo", 80)
    assert eighty.labels[1] == "8 prompts ours" and eighty.sampling_s == pytest.approx(10 * 8.0 / 2)
    assert eighty.update_s == pytest.approx(80 * one.update_s)
    long = work_of((1600, 28, 32), shape, "grpo", 8, 64)
    share = long.forward_flops(0, shape) / update_flops(long, shape, config.algorithm, "grpo", 1)
    of_long = forecast(measured, long, shape, config, "grpo", 1)
    assert of_long.sampling_s == pytest.approx(share * of_long.update_s) and of_long.sampling_s > 2 * one.sampling_s
    supervised = forecast(measured, work_of((16, 28, 32), shape, "sft", 8, 64), shape, config, "sft", 1)
    assert supervised.sampling_s == 0 and supervised.labels == one.labels[:1]


def test_rows_are_chosen_that_ran_as_the_settings_ask(results: Path) -> None:
    config = parse_args([*RECIPE, "--gradient_checkpointing", "true"])
    shape = model_config(config.model)
    seven = forecast(read_measured(results), work_of((16, 28, 32), shape, "tempsamp", 4, 128), shape, config, "grpo", 1)
    assert seven.labels == ("7B C=32 G=8 recomputed packed", "8 prompts ours, graphs")
    assert seven.sampling_s == pytest.approx(2.0 * 8_292_166_656 / 3_754_622_976)


def test_the_plan_expects_step_times_and_says_what_it_assumes(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*RECIPE, "--gpus", "4", "--measured", str(results)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("s expected per step, of which sampling takes") == 2
    assert f"expected from {results} (NVIDIA H100 80GB HBM3), rows '7B C=32 G=8 packed' (MFU 0.40)" in printed
    assert "assuming that updates run at" in printed and "no measurement" not in printed


def test_a_rehearsal_is_called_simulated(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsed = json.loads(results.read_text()) | {"gpu": "simulated H100", "simulated": True}
    results.write_text(json.dumps(rehearsed))
    assert main([*RECIPE, "--measured", str(results)]) == 0
    assert f"simulated, not measured: expected from {results} (simulated H100)" in capsys.readouterr().out


@pytest.mark.parametrize(("gpu", "says"), [("H100", False), ("H200", True), ("A100", True)])
def test_a_plan_for_another_gpu_than_was_measured_says_so(
    results: Path, capsys: pytest.CaptureFixture[str], gpu: str, says: bool
) -> None:
    assert main([*RECIPE, "--measured", str(results), "--gpu", gpu]) == 0
    assert (f"; these are not times of the {gpu} asked for\n" in capsys.readouterr().out) is says


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "FileNotFoundError"),
        ("{", "not a results file"),
        ("[]", "not a results file"),
        ('{"gpu": "x", "sections": {}}', "no figures of the section update"),
    ],
)
def test_a_file_without_figures_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, named: str
) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content)
    assert main(["--measured", str(file)]) == 2
    assert f"error: --measured {file}: " in (line := capsys.readouterr().err) and named in line


def test_a_section_that_was_skipped_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "results.json", update=UPDATE, rollout=ROLLOUT[3:])
    with pytest.raises(ValueError, match=r"results\.json: has no figures of the section rollout; run bench/gpu\.py"):
        read_measured(file)

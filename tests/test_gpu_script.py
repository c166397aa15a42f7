"""bench/gpu.py where there is no GPU: the table of sections, records that survive failures, the merge of results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_sections import child
from bench.gpu_sections.child import Record
from bench.gpu_sections.kernels import all_suites, counts, run_tests
from bench.gpu_sections.watch import settings, summarise

ROOT = Path(gpu.__file__).parents[1]
SECTION_FOLDER = ROOT / "bench/gpu_sections"
ABSENT = ["torchcodec", "decord", "tempsamp_fast._video", "liger_kernel", "trl"]
OK = {"rows": [{"label": "a", "ms": 1.0}], "error": None}


def modules_with_measure() -> set[str]:
    pattern = re.compile(r"^def measure\(\s*record: Record", re.MULTILINE)
    return {path.stem for path in SECTION_FOLDER.glob("*.py") if pattern.search(path.read_text())}


def test_every_section_is_a_module_and_every_module_a_section() -> None:
    assert set(gpu.SECTIONS) == modules_with_measure()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(gpu.SECTIONS))
def test_sections_import_without_a_gpu(name: str) -> None:
    """In a process of its own, as the script runs them, and without the packages that they do not say they need."""
    absent = gpu.missing_modules(gpu.SECTIONS[name])
    if absent:
        pytest.skip(f"{name} needs {', '.join(absent)}")
    blocked = [module for module in (*ABSENT, "deepspeed") if module not in gpu.SECTIONS[name].needs]
    program = f"import sys; sys.modules.update(dict.fromkeys({blocked})); "
    program += f"from inspect import signature; from bench.gpu_sections.{name} import measure; "
    program += "signature(measure).bind('a record')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--section", "environment"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "CUDA GPU" in error and error.count("\n") == 1


def test_an_unknown_section_is_refused_with_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--section", "speed"])
    error = capsys.readouterr().err
    assert "'speed'" in error and all(name in error for name in gpu.SECTIONS)


def test_a_section_with_a_missing_package_is_recorded_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.SECTIONS, "loss", gpu.Section("a section", ("json", "no_such_package")))
    result = gpu.run_section("loss")
    assert result["rows"] == [] and "no_such_package" in result["error"] and "json" not in result["error"]


def test_a_failure_is_recorded_and_what_comes_after_still_runs(tmp_path: Path) -> None:
    def measure(record: Record) -> None:
        record.add("before", ms=1.0, goals={"ms": ("at most", 2.0)})
        with record.attempt("contender"):
            raise ValueError("gradients differ\nby a lot")
        record.add("after", ms=2.0)

    assert child.run(lambda: measure, tmp_path / "rows.json") == 1
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [row["label"] for row in kept["rows"]] == ["before", "after"]
    assert kept["rows"][0]["goals"] == {"ms": ["at most", 2.0]}
    assert kept["error"] == "contender: ValueError: gradients differ"


def test_a_section_without_failures_has_no_error(tmp_path: Path) -> None:
    assert child.run(lambda: lambda record: record.add("only", ms=1.0), tmp_path / "rows.json") == 0
    assert json.loads((tmp_path / "rows.json").read_text())["error"] is None


def test_a_section_that_cannot_be_imported_is_recorded_with_the_reason(tmp_path: Path) -> None:
    assert child.run(lambda: import_module("bench.gpu_sections.no_such_section"), tmp_path / "rows.json") == 1
    error = json.loads((tmp_path / "rows.json").read_text())["error"]
    assert error.startswith("section: ModuleNotFoundError") and "no_such_section" in error


def test_what_does_not_fit_or_is_not_installed_is_a_row_with_the_reason(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(child, "card_gib", lambda: 80.0)
    record = Record(tmp_path / "rows.json")
    assert record.fits("small", 70.0) and not record.fits("large", 77.0)
    assert record.has("with json", "json") and not record.has("with more", "json", "no_such_package")
    assert record.rows == [
        {"label": "large", "skipped": "takes about 77 GiB by arithmetic, and this GPU has 80"},
        {"label": "with more", "skipped": "needs no_such_package, not installed"},
    ]
    assert not record.errors


def test_without_git_and_an_answering_nvidia_smi_there_are_still_conditions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu.conditions(None)
    assert found["commit"] is None and found["gpu_settings"] is None
    assert gpu.conditions("0123abc")["commit"] == "0123abc"
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    smi.chmod(0o755)
    assert settings() is None
    smi.write_text("#!/bin/sh\necho '580.1, 1980, 3201, 700.00'\n")
    assert settings() == {
        "driver": "580.1", "max_sm_mhz": "1980", "max_memory_mhz": "3201", "power_limit_watts": "700.00",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ending", "time_limit_s", "error"),
    [("os._exit(3)", 60, "ended before its end (exit code 3)"), ("time.sleep(600)", 1, "stopped after 1 s")],
)
def test_rows_outlive_a_crash_and_the_time_limit(tmp_path: Path, ending: str, time_limit_s: float, error: str) -> None:
    """Of a child that has written them, as `Record` does, and then dies or hangs."""
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps({"rows": [{"label": "a"}], "error": "ended before its end"}))
    outcome = gpu.run_child([sys.executable, "-c", f"import os, time; {ending}"], rows, time_limit_s)
    assert outcome == {"rows": [{"label": "a"}], "error": error}


def test_a_child_that_never_starts_is_an_error(tmp_path: Path) -> None:
    outcome = gpu.run_child([sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "rows.json", 60)
    assert outcome == {"rows": [], "error": "did not start (exit code 1)"}


def test_merge_replaces_one_section_and_keeps_the_order_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "results/gpu.json"
    for name, result in (("job", OK), ("loss", {**OK, "error": "old"}), ("environment", OK), ("loss", OK)):
        gpu.merge(file, "A GPU", name, result)
    document = json.loads(file.read_text())
    assert list(document["sections"]) == ["environment", "loss", "job"]
    assert all(result == OK for result in document["sections"].values())


def test_merge_refuses_the_results_of_another_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    gpu.merge(file, "A GPU", "loss", OK)
    before = file.read_text()
    with pytest.raises(ValueError, match=r"'A GPU'.*'Another GPU'"):
        gpu.merge(file, "Another GPU", "loss", OK)
    assert file.read_text() == before


def test_results_are_named_after_the_gpu() -> None:
    assert gpu.results_file("NVIDIA H100 80GB HBM3") == ROOT / "bench/results/nvidia_h100_80gb_hbm3.json"


def test_the_table_shows_figures_goals_and_the_error() -> None:
    goals = {"mfu": ["at least", 0.35], "gib": ["at most", 2.0]}
    rows = [{"label": "3B", "mfu": 0.4, "gib": 2.5, "spread_ms": [1.0, 2.0], "goals": goals}]
    shown = gpu.table("update", {"rows": rows, "error": "7B: OutOfMemoryError"})
    assert "mfu 0.4 (goal: at least 0.35, reached)" in shown
    assert "gib 2.5 (goal: at most 2, MISSED)" in shown
    assert "spread_ms [1, 2]" in shown and shown.endswith("error: 7B: OutOfMemoryError")


def test_a_figure_that_is_not_a_number_misses_its_goal() -> None:
    assert all("MISSED" in gpu.verdict(float("nan"), [kind, 1.0]) for kind in ("at least", "at most"))


def test_watch_summarises_whole_samples_only() -> None:
    lines = ["345, 3201, 0, 75.1", "1980, 3201, 100, 690.0", "1755, 3201, 80, 650.0", "[N/A], 3201, 1, 2", "19"]
    summary = summarise(lines)
    assert summary is not None
    assert (summary["sm_mhz"], summary["max_sm_mhz_seen"], summary["num_samples"]) == (1755, 1980, 3)
    assert summary["busy_share"] == pytest.approx(0.6)
    assert summarise(["[N/A], [N/A], [N/A], [N/A]"]) is None


def test_counts_of_a_test_report_add_up_over_suites() -> None:
    report = '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="2"/><testsuite tests="1"/></testsuites>'
    assert counts(report) == {"tests": 4, "failures": 1, "errors": 0, "skipped": 2}


def test_a_test_run_without_a_report_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit code 4"):
        run_tests(["--noconftest", "--no-such-option"])


@pytest.mark.slow
@pytest.mark.parametrize("suite", all_suites())
def test_tests_for_a_gpu_are_collected_where_little_more_than_torch_is_installed(suite: str) -> None:
    arguments = ["-q", "--collect-only", "-p", "no:cacheprovider", *all_suites()[suite]]
    program = f"import sys, pytest\nsys.modules.update(dict.fromkeys({ABSENT}))\nsys.exit(pytest.main({arguments}))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize(("size", "billions"), [("3B", 3.755), ("7B", 8.292)])
def test_random_models_have_the_published_number_of_parameters(size, billions: float) -> None:
    """Of the checkpoints on the hub, tower included and tied weights once."""
    models = pytest.importorskip("bench.gpu_sections.models")
    with torch.device("meta"):
        model = models.Qwen2_5_VLForConditionalGeneration(models.model_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)

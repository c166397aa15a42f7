"""bench/gpu.py where there is no GPU: the table of sections, records that survive failures, the merge of results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_sections import child
from bench.gpu_sections.kernels import counts
from bench.gpu_sections.watch import summarise

ROOT = Path(gpu.__file__).parents[1]
SECTION_FOLDER = ROOT / "bench/gpu_sections"
OK = {"rows": [{"label": "a", "ms": 1.0}], "error": None}


def modules_with_measure() -> set[str]:
    return {path.stem for path in SECTION_FOLDER.glob("*.py") if "\ndef measure(record: Record)" in path.read_text()}


def test_every_section_is_a_module_and_every_module_a_section() -> None:
    assert set(gpu.SECTIONS) == modules_with_measure()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(gpu.SECTIONS))
def test_sections_import_without_a_gpu(name: str) -> None:
    """In a process of its own, as the script runs them: some import trainers that hook themselves in."""
    absent = gpu.missing_modules(gpu.SECTIONS[name])
    if absent:
        pytest.skip(f"{name} needs {', '.join(absent)}")
    program = f"from bench.gpu_sections.{name} import measure; assert callable(measure)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


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
    def measure(record: child.Record) -> None:
        record.add("before", ms=1.0, goals={"ms": ("at most", 2.0)})
        with record.attempt("contender"):
            raise ValueError("gradients differ\nby a lot")
        record.add("after", ms=2.0)

    assert child.run(measure, tmp_path / "rows.json") == 1
    kept = json.loads((tmp_path / "rows.json").read_text())
    assert [row["label"] for row in kept["rows"]] == ["before", "after"]
    assert kept["rows"][0]["goals"] == {"ms": ["at most", 2.0]}
    assert kept["error"] == "contender: ValueError: gradients differ"


def test_a_section_without_failures_has_no_error(tmp_path: Path) -> None:
    assert child.run(lambda record: record.add("only", ms=1.0), tmp_path / "rows.json") == 0
    assert json.loads((tmp_path / "rows.json").read_text())["error"] is None


@pytest.mark.parametrize(
    ("ending", "time_limit_s", "error"),
    [("os._exit(3)", 60, "ended before its end (exit code 3)"), ("time.sleep(60)", 4, "stopped after 4 s")],
)
def test_rows_outlive_a_crash_and_the_time_limit(tmp_path: Path, ending: str, time_limit_s: float, error: str) -> None:
    """The child writes a record as `Record` does, then dies or hangs."""
    rows = tmp_path / "rows.json"
    kept = json.dumps({"rows": [{"label": "a"}], "error": "ended before its end"})
    program = f"import os, pathlib, time; pathlib.Path({str(rows)!r}).write_text({kept!r}); {ending}"
    outcome = gpu.run_child([sys.executable, "-c", program], rows, time_limit_s)
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


@pytest.mark.parametrize(("size", "billions"), [("3B", 3.755), ("7B", 8.292)])
def test_random_models_have_the_published_number_of_parameters(size, billions: float) -> None:
    """Of the checkpoints on the hub, tower included and tied weights once."""
    models = pytest.importorskip("bench.gpu_sections.models")
    with torch.device("meta"):
        model = models.Qwen2_5_VLForConditionalGeneration(models.model_config(size))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)

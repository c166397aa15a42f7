"""The README's table of GPU figures, from files such as bench/gpu.py leaves."""

from __future__ import annotations

from pathlib import Path

from bench import gpu
from bench.readme_tables import NO_GPU, gpu_table

CONDITIONS = {"commit": "0123456789abcdef", "seconds": 1.0}


def test_without_a_results_file_there_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "video_cpu.json").write_text("{}")
    assert gpu_table(tmp_path) == NO_GPU


def test_figures_with_a_goal_stand_there_with_their_commit(tmp_path: Path) -> None:
    goals = {"mfu": ["at least", 0.35], "over_unpacked": ["at least", 6.0]}
    rows = [
        {"label": "3B packed", "mfu": 0.4123, "over_unpacked": 5.5, "ms": 1.0, "goals": goals},
        {"label": "3B unpacked", "mfu": 0.3, "ms": 2.0},
    ]
    file = tmp_path / gpu.results_file("NVIDIA H200").name
    gpu.merge(file, "NVIDIA H200", "update", {"rows": rows, "error": "7B: OutOfMemoryError", **CONDITIONS})
    logits = {"label": "ours", "share": None, "goals": {"share": ["at least", 0.85]}}
    gpu.merge(file, "NVIDIA H200", "logits", {"rows": [logits], "error": None, "commit": None})
    assert gpu_table(tmp_path).splitlines() == [
        "| NVIDIA H200 | figure | goal | commit |",
        "|---|---|---|---|",
        "| logits: ours | share unknown | at least 0.85 | unknown |",
        "| update: 3B packed | mfu 0.412 | at least 0.35 | 0123456 |",
        "| update: 3B packed | over_unpacked 5.5 | at least 6 | 0123456 |",
        "",
        "Parts of update failed there: the file says which.",
    ]


def test_two_gpus_have_a_table_each(tmp_path: Path) -> None:
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        gpu.merge(tmp_path / gpu.results_file(name).name, name, "tuning", {"rows": [], "error": None, **CONDITIONS})
    shown = gpu_table(tmp_path)
    assert shown.count("| figure | goal | commit |") == 2 and not shown.endswith("\n")

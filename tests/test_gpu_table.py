"""The README's table of GPU figures, from files such as bench/gpu.py leaves."""

from __future__ import annotations

from pathlib import Path

from bench import gpu
from bench.gpu_sections.rollout import NUM_PROMPTS
from bench.gpu_sections.update import Shape
from bench.readme_tables import NO_GPU, REHEARSED, gpu_table, rehearsal_table

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


def test_a_card_stands_beside_what_was_simulated_for_it(tmp_path: Path) -> None:
    assert all(line.endswith((" | - |", "|---|---|---|")) for line in rehearsal_table(tmp_path).splitlines()[1:-2])
    rows = [{"label": "3B C=32 G=8 packed", "mfu": 0.4123, "ms": 1.0}, {"label": "3B C=256 G=8 packed", "ms": 2.0}]
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        file = tmp_path / gpu.results_file(name).name
        gpu.merge(file, name, "update", {"rows": rows[: 1 + name.endswith("H200")], "error": None, **CONDITIONS})
    header, _, *lines = rehearsal_table(tmp_path).splitlines()
    assert header.endswith("| what NVIDIA H100 80GB HBM3 said | what NVIDIA H200 said |")
    said = {line.split(" | ")[0]: line.split(" | ")[2:] for line in lines[:-2]}
    assert said["| update 3B, one prompt, 8 answers of 32: MFU"] == ["0.412", "0.412 |"]
    assert said["| update 3B, 8 answers of 256: MFU"] == ["-", "- |"]


def test_what_is_simulated_and_measured_has_the_labels_that_the_sections_give() -> None:
    labels = {place[1] for _, place in REHEARSED.values() if place}
    assert labels >= {f"{number} prompts ours, graphs" for number in NUM_PROMPTS}
    assert labels >= {f"{size} {shape} packed" for size, shape in (("3B", Shape(32, 8)), ("3B", Shape(256, 8)))}

"""Every GPU figure of this project, by one command on any machine with a CUDA GPU.

    python bench/gpu.py [--section NAME ...] [--out FILE] [--commit HASH]
    python bench/gpu.py first|second --out FOLDER [--kit FOLDER] [--commit HASH]
    python bench/gpu.py collect FOLDER

A section checks first and times second, in a process of its own that is stopped after eight minutes; what it measured
until then is kept. After every section its table is printed and its result replaces the one before in
bench/results/<gpu name>.json; a section that fails is recorded with its error, and the next one runs.

`first` and `second` are two runs on a card that is there for minutes: what matters most of every section, each item
within a box of seconds, a line on disk after it (`bench/gpu_runs`). `collect` puts the lines of both into the results.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = SOURCES  # a checkout runs without being installed

import torch  # noqa: E402

from bench.gpu_runs.orchestrator import collected  # noqa: E402
from bench.gpu_runs.perform import perform  # noqa: E402
from bench.gpu_sections.watch import GpuWatch, settings  # noqa: E402
from tempsamp_fast.run.log import describe_machine, write_json  # noqa: E402

TIME_LIMIT_S = 470.0


@dataclass(frozen=True)
class Section:
    """One module of bench/gpu_sections."""

    about: str
    needs: tuple[str, ...] = ()
    """Modules that are not everywhere."""


SECTIONS = {
    "environment": Section("the GPU, and two ceilings: copy bandwidth and bf16 GEMM"),
    "micro": Section("single operations on which choices hang, against what they replace"),
    "smoke": Section("the GPU computes what the CPU was tested to compute"),
    "kernels": Section("tests on the GPU", ("pytest",)),
    "loss": Section(
        "fused loss from hidden states, 3B and 7B heads, against its peers", ("pytest", "liger_kernel", "trl")
    ),
    "tuning": Section("rows per chunk of the fused loss"),
    "logits": Section("loss from logits, against Liger and a device copy", ("pytest", "liger_kernel")),
    "attention": Section("shared-prefix attention, and a packed model against fp32"),
    "update": Section("update of Qwen2.5-VL 3B and 7B shapes, packed against unpacked"),
    "step": Section("whole step, 3B shape, against a TimeZero-style one and TRL's trainer"),
    "rollout": Section("sampling, 3B shape, against generate and continuous batching"),
    "video": Section("hardware decoders, and patches normalised on the GPU", ("pytest",)),
    "job": Section("deepspeed tempsamp_fast/train.py: tiny recipe and 3B shape", ("deepspeed",)),
    "trainer": Section("the trainer's own steps in one process, random patches under ZeRO-1", ("deepspeed",)),
    "sanitizer": Section("memory errors and races on small shapes"),
}


def results_file(gpu_name: str) -> Path:
    """Where the results of a GPU are kept: bench/results/nvidia_h100.json, say."""
    return ROOT / "bench/results" / (re.sub(r"\W+", "_", gpu_name).strip("_").lower() + ".json")


def missing_modules(section: Section) -> list[str]:
    """What of `needs` cannot be imported."""
    return [name for name in section.needs if find_spec(name) is None]


def run_section(name: str, commit: str | None = None) -> dict[str, Any]:
    """The result of one section: its rows, its error or None, and under which conditions they came about.

    commit: of the code, where git does not tell.
    """
    missing = missing_modules(SECTIONS[name])
    if missing:
        outcome = {"rows": [], "error": f"needs {', '.join(missing)}, not installed: see bench/GPU_TODO.md"}
        return {**outcome, **conditions(commit)}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, GpuWatch() as watch:
        rows = Path(folder) / "rows.json"
        outcome = run_child([sys.executable, "-m", "bench.gpu_sections.child", name, str(rows)], rows, TIME_LIMIT_S)
    seconds = round(time.perf_counter() - started, 1)
    return {**outcome, "seconds": seconds, "gpu_watch": watch.summary(), **conditions(commit)}


def run_child(command: Sequence[str], rows: Path, time_limit_s: float) -> dict[str, Any]:
    """Run a command that keeps `{"rows": [...], "error": ...}` in the file `rows`; stop it and its children in time."""
    search = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": search}, start_new_session=True)
    stopped = None
    try:
        child.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        stopped = f"stopped after {time_limit_s:.0f} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    outcome = json.loads(rows.read_text()) if rows.exists() else {"rows": [], "error": "did not start"}
    if outcome["error"]:
        outcome["error"] = (stopped or f"{outcome['error']} (exit code {child.returncode})").replace(str(ROOT), ".")
    return outcome


def conditions(commit: str | None) -> dict[str, Any]:
    """When, with what versions, and the clocks and limits of the GPU as found."""
    machine = describe_machine()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or machine["commit"],
        **{name: machine[name] for name in ("python", "versions")},
        "cuda": torch.version.cuda,
        "gpu_settings": settings(),
    }


def merge(file: Path, gpu_name: str, name: str, result: Mapping[str, Any]) -> None:
    """Replace one section in the results file and leave the others as they are. Raises ValueError for another GPU's."""
    document = json.loads(file.read_text()) if file.exists() else {"gpu": gpu_name, "sections": {}}
    if document.get("gpu") != gpu_name:
        raise ValueError(f"--out {file} holds the results of {document.get('gpu')!r}, and this GPU is {gpu_name!r}")
    sections = {**document["sections"], name: dict(result)}
    document["sections"] = {known: sections[known] for known in sorted(sections, key=list(SECTIONS).index)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)


def table(name: str, result: Mapping[str, Any]) -> str:
    """A section as text: a line per row, figures with a goal marked by whether they reach it."""
    lines = [f"== {name}: {SECTIONS[name].about}"]
    for row in result["rows"]:
        goals = row.get("goals", {})
        figures = [
            f"{key} {shown(value)}" + (f" ({verdict(value, goals[key])})" if key in goals else "")
            for key, value in row.items()
            if key not in ("label", "goals")
        ]
        lines.append(f"{row['label']:<36}" + "  ".join(figures))
    if result["error"]:
        lines.append(f"error: {result['error']}")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Figures to four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) + "}"
    return str(value)


def verdict(value: float | None, goal: Sequence[Any]) -> str:
    """`goal` is "at least" or "at most", and the bound; a figure that is not known misses it."""
    kind, bound = goal
    reached = value is not None and (value >= bound if kind == "at least" else value <= bound)
    return f"goal: {kind} {shown(bound)}, {'reached' if reached else 'MISSED'}"


def collect(folder: Path) -> int:
    """Put the lines of the runs in a folder into the results of their GPU, and print them."""
    files = sorted(folder.glob("*.jsonl"))
    for name, result in collected(files).items():
        gpu_name = result.pop("gpu")
        merge(results_file(gpu_name), gpu_name, name, result)
        print(table(name, result), flush=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 when a section has an error."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name:<12} {section.about}" for name, section in SECTIONS.items()),
    )
    parser.add_argument("run", nargs="?", choices=["first", "second", "collect"], help="default: whole sections")
    parser.add_argument("folder", nargs="?", type=Path, help="of `collect`: what --out was")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--out", type=Path, help="default: bench/results/<gpu name>.json; a folder for a run")
    parser.add_argument("--kit", type=Path, help="what `make gpu-kit` made: packages and data that are not there")
    parser.add_argument("--commit", help="of the code, where there is no git repository to tell")
    options = parser.parse_args(arguments)
    if options.run == "collect":
        return collect(options.folder or parser.error("collect needs the folder"))
    if not torch.cuda.is_available():
        sys.stderr.write(f"error: bench/gpu.py needs a CUDA GPU, and torch {torch.__version__} finds none\n")
        return 2
    gpu_name = torch.cuda.get_device_name()
    if options.run:
        out = options.out or parser.error(f"{options.run} needs --out")
        return perform(options.run, out, lambda: {"gpu": gpu_name, **conditions(options.commit)}, options.kit)
    file = options.out or results_file(gpu_name)
    num_failed = 0
    for name in options.section:
        result = run_section(name, options.commit)
        merge(file, gpu_name, name, result)
        print(table(name, result), flush=True)
        num_failed += bool(result["error"])
    print(f"{len(options.section) - num_failed} of {len(options.section)} sections without an error; results in {file}")
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())

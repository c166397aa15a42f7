"""A hundred training steps of each model family on the embedded data, recorded: a change of structure moves no bit.

    python bench/recorded_steps.py record    # bench/results/recorded_steps.json and its answers, from this tree
    python bench/recorded_steps.py compare   # trains again; exit code 1 and the first difference unless all is equal

Eighty steps are supervised and twenty TempSamp-R1, in both modes, with a reference, on encoded videos. `compare`
samples anew, so equal answers say that sampling is the same too. Bits are comparable on one processor and one torch
alone: elsewhere it says what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
FIGURES = ("loss", "optim/grad_norm", "reward/on_policy_mean", "policy/entropy")
SETTINGS = {
    "phases": "sft/answer+think:80@2e-3,tempsamp/answer+think:20@5e-4",
    "synthetic_videos": "40,2,4",
    "max_eval_samples": "0",
    "prompts_per_device": "4",
    "sft_prompts_per_device": "8",
    "gradient_accumulation_steps": "2",
    "beta": "0.04",
    "max_completion_length": "40",
    "seed": "7",
}


def train(family: str, folder: Path, videos: Path) -> list[dict[str, Any]]:
    """The figures of every step of a run in `folder`; its answers go to `answers.jsonl` there."""
    flags = SETTINGS | {
        "tiny_family": family,
        "synthetic_dir": str(videos),
        "output_dir": str(folder),
        "record_rollouts": str(folder.with_suffix(".jsonl")),
    }
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }
    command = [sys.executable, "tempsamp_fast/train.py", *(f"--{name}={value}" for name, value in flags.items())]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", *FIGURES) if name in row} for row in rows if "loss" in row]


def answers_file(family: str) -> Path:
    return RESULTS / f"recorded_answers_{family}.jsonl"


def differences(recorded: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    """One line for each figure that is not the same to the bit."""
    if len(recorded) != len(found):
        return [f"{len(recorded)} steps were recorded, {len(found)} ran"]
    return [
        f"step {before['step']}, {name}: recorded {before.get(name)!r}, found {after.get(name)!r}"
        for before, after in zip(recorded, found, strict=True)
        for name in FIGURES
        if before.get(name) != after.get(name)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "compare"))
    verb = parser.parse_args().verb
    file = RESULTS / "recorded_steps.json"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        steps = {family: train(family, work / family, work / "videos") for family in FAMILIES}
        answers = {family: (work / f"{family}.jsonl").read_text() for family in FAMILIES}
        machine = json.loads((work / FAMILIES[0] / "machine.json").read_text())
    if verb == "record":
        file.write_text(json.dumps({"machine": machine, "settings": SETTINGS, "steps": steps}, indent=1) + "\n")
        for family, text in answers.items():
            answers_file(family).write_text(text)
        return 0
    recorded = json.loads(file.read_text())
    if recorded["settings"] != SETTINGS:
        raise SystemExit(f"{file.name} was recorded with other settings; record it again")
    lines = [
        f"{family}: {line}" for family in FAMILIES for line in differences(recorded["steps"][family], steps[family])
    ]
    lines += [f"{family}: answers differ" for family in FAMILIES if answers_file(family).read_text() != answers[family]]
    print("\n".join(lines[:20]) or f"equal to the bit: {sum(map(len, steps.values()))} steps and all answers")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

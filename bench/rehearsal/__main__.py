"""The GPU path rehearsed without a GPU: `make rehearse` (QUICK=1 for a selection) writes bench/results/rehearsal.json.

Tensors on `cuda:0` are fakes of a pretended H100: shapes, dtypes, strides and devices are torch's own, there is no
memory behind them and nothing is computed. Tensors on the CPU are real. Every operation on a fake is booked (`ledger`)
at what it costs by its shapes (`costs`), every wait for the device with the line that waits, every storage that lives.
Triton kernels are compiled for sm_90 with the types of the call and stop there (`triton_double`). `rules` says what
makes a rehearsal fail, `scenarios` what is played, `traps` proves that it fails.

It sees wrong devices and dtypes, waits, what a CUDA graph cannot record, kernels that do not compile or spill, peaks of
memory and counts of launches, FLOPs and bytes. It cannot see a value, a race, an address, what an operator does inside
itself, fragmentation, NCCL, another thread, or real speed: its milliseconds are simulated, not measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.rehearsal.card import CARD
from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.rules import failures
from bench.rehearsal.scenarios import engine, kernels, long, rollouts, sections, small, timezero, updates
from bench.rehearsal.scenarios.models import Shape
from bench.rehearsal.stage import set_up
from bench.rehearsal.triton_double import COMPILED

PROCESSES = 2
"""Of a whole rehearsal; each takes a core and up to 4 GiB."""
RESULTS = Path(__file__).parents[1] / "results" / "rehearsal.json"
Case, Variant = rollouts.Case, updates.Variant
WHOLE = [
    Variant(has_liger=False), Variant(), Variant(recomputed="all"), Variant(recomputed="tower"),
    Variant(is_packed=False), Variant(has_frozen_tower=True), Variant(Shape(256)),
    Variant(Shape(num_groups=4), recomputed="all"), Variant(Shape(48, 5, num_groups=4, is_tree=True)),
]  # fmt: skip
UPDATES = {
    "3B": WHOLE, "7B": [Variant(), Variant(Shape(256))], "Qwen3-VL-8B": [Variant(), Variant(is_packed=False)],
    "Qwen3.5-4B": [Variant()],
}  # fmt: skip
ROLLOUTS = {
    "3B": [Case(1, False), *(Case(number, True) for number in (1, 8, 32)), Case(4, False, True),
           Case(4, True, True)],
    "7B": [Case(8, True)],
    "Qwen3-VL-8B": [Case(8, True)],
    "Qwen3.5-4B": [Case(8, True)],
}  # fmt: skip
ENGINES = [(0, 2, False), (1, 2, False), (2, 2, False), (3, 2, False), (1, 2, True), (1, None, False)]
"""(ZeRO stage, layers, frozen tower)."""
LONG_ROWS = (1, 8)
"""Ranks that share one."""


def scenarios(is_quick: bool) -> dict[str, Callable[[], Any]]:
    """What is played, by name; results go to the place that the name says."""
    sizes = ["3B"] if is_quick else list(UPDATES)
    found: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        variants = [Variant(), Variant(is_packed=False)] if is_quick else UPDATES[size]
        cases = [Case(1, True), Case(4, False, True)] if is_quick else ROLLOUTS[size]
        found[f"{size}/update"] = partial(updates.play, size, variants)
        found[f"{size}/rollout"] = partial(rollouts.play, size, cases)
        for length in (32, 128) if size == "3B" and not is_quick else ():
            found[f"{size}/step C={length}"] = partial(timezero.play, size, length)
    for ranks in () if is_quick else LONG_ROWS:
        found[f"3B/long row, {ranks} ranks"] = partial(long.play, "3B", ranks)
    for stage, depth, frozen in ENGINES[1:2] if is_quick else ENGINES:
        name = f"ZeRO {stage}, {depth or 'all'} layers{', frozen tower' * frozen}"
        found[f"3B/update() behind {name}"] = partial(engine.play, stage, depth, frozen)
    if not is_quick:
        found |= {"kernels": kernels.play, "sections": sections.play}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a selection, which writes no results")
    parser.add_argument("--small", action="store_true", help="an update and a rollout of two layers, for `traps`")
    parser.add_argument("--only", help="scenarios whose name has this part; the others' results stay as they are")
    parser.add_argument("--exactly", nargs="+", help="these scenarios and no others' results")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    played = {"small": small.play} if options.small else scenarios(options.quick)
    if not (options.quick or options.small or options.only or options.exactly):
        return play_all(list(played), options.out)
    logging.disable(logging.WARNING)
    set_up()
    is_kept = not (options.quick or options.small)
    before = json.loads(options.out.read_text()) if options.only and is_kept and options.out.exists() else {}
    models, now = before.get("models", {}), {}
    for name, play in played.items():
        if (options.only and options.only not in name) or (options.exactly and name not in options.exactly):
            continue
        figures = perform(name, play)
        size, _, what = name.partition("/")
        if figures:
            now[name] = models.setdefault(size, {})[what] = figures
        if is_kept:
            options.out.write_text(json.dumps(document(models, before.get("kernels", ())), indent=1) + "\n")
    wrong = failures(now)
    for line in wrong:
        print(f"FAILED {line}")
    print(f"{len(wrong)} failures, {len(COMPILED)} kernels compiled")
    return 1 if wrong else 0


def play_all(names: Sequence[str], out: Path) -> int:
    """All scenarios, in as many processes at once as `PROCESSES` says; their results in one file."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{index}.json" for index in range(PROCESSES)]
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.rehearsal", "--out", str(file), "--exactly", *names[index::PROCESSES]]
            )
            for index, file in enumerate(files)
        ]
        codes = [child.wait() for child in children]
        parts = [json.loads(file.read_text()) for file in files if file.exists()]
    models: dict[str, Any] = {}
    for size, _, what in (name.partition("/") for name in names):
        for part in parts:
            if what in part["models"].get(size, {}):
                models.setdefault(size, {})[what] = part["models"][size][what]
    kernels_of_all = [row for part in parts for row in part["kernels"]]
    out.write_text(json.dumps(document(models, kernels_of_all), indent=1) + "\n")
    return int(any(codes))


def perform(name: str, play: Callable[[], Any]) -> Any:
    """The figures of a scenario. Whatever it raises makes the rehearsal fail, and the next one is played."""
    began, LEDGER.base = time.perf_counter(), LEDGER.live
    figures = None
    try:
        with CARD:
            figures = play()
    except Exception as error:
        traceback.print_exc()
        LEDGER.violations.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    gc.collect()
    print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    if figures:
        print(json.dumps(figures, indent=1), flush=True)
    return figures


def document(models: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The results file. others: rows of kernels as they were compiled elsewhere, for those not compiled here."""
    used = _worst(others) | _worst({"kernel": entry.name, **entry.resources()} for entry in COMPILED.values())
    return {
        "what": "simulated on a pretended H100, not measured",
        "gpu": "simulated H100",
        "simulated": True,
        "models": models,
        "kernels": [used[name] for name in sorted(used)],
        "sections": measured_sections(models),
    }


def _worst(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kernel, the one with the most spilled, then the most used, registers."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        last = found.get(row["kernel"], row)
        found[row["kernel"]] = max(row, last, key=lambda each: (each["spilled"], each["registers"]))
    return found


def measured_sections(models: dict[str, Any]) -> dict[str, Any]:
    """The cautious figures as `bench/gpu.py` writes measured ones, for `tempsamp_fast.plan --measured`."""
    update_rows, rollout_rows = [], []
    for size, parts in models.items():
        for name, row in parts.get("update", {}).items():
            if name.endswith(" packed") and "plain layers" not in name:
                ms, flops = row["cautious_ms"], row["model_flops"]
                figures = {"ms": ms, "tflop": flops / 1e12, "mfu": row["mfu_cautious"]}
                update_rows.append({"label": f"{size} {name}", **figures})
        for name, row in parts.get("rollout", {}).items():
            number, _, rest = name.partition(" prompts")
            if size != "3B" or "rows end" in rest:
                continue
            length, count = 128, int(number) * rollouts.NUM_ANSWERS
            ms = 1e3 * rollouts.seconds(row, length)
            rates = {"rollouts_per_s": 1e3 * count / ms, "tokens_per_s": 1e3 * count * length / ms}
            rollout_rows.append({"label": f"{number} prompts ours{rest}", "ms": ms, **rates})
    return {"update": {"rows": update_rows}, "rollout": {"rows": rollout_rows}}


if __name__ == "__main__":
    sys.exit(main())

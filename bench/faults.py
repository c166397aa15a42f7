"""The fault campaign: kill, starve and feed garbage to tiny runs; every one must go on as if nothing had been.

    python bench/faults.py [--only kills inputs disks ranks] [--kills 60] [--work DIR] [--results FILE]

Runs are disturbed until `--kills` kills have landed: one that comes after the end of its run does not count.
Resumable: what the results file holds is not repeated (`--again NAME...` repeats). Several may run at once, with parts
of their own (`--only`) and a folder each (`--work`). `disks` mounts small tmpfs folders and needs root. The exit code
is the number of cases that did not come out as they must.
"""

from __future__ import annotations

import argparse
import fcntl
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout runs without being installed
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from tempsamp_fast.system.device import prepare_environment  # noqa: E402

prepare_environment()

import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: E402, F401

from bench.fault_campaign.children import World  # noqa: E402
from bench.fault_campaign.disks import disk_cases  # noqa: E402
from bench.fault_campaign.inputs import input_cases  # noqa: E402
from bench.fault_campaign.kills import Kills  # noqa: E402
from bench.fault_campaign.ranks import rank_cases  # noqa: E402
from tempsamp_fast.report import plots  # noqa: E402
from tempsamp_fast.run.log import describe_machine, write_json  # noqa: E402

RESULTS = ROOT / "bench/results/faults.json"
PARTS = ("kills", "inputs", "disks", "ranks")
GOOD = ("equal", "refused", "ended by name", "survived")
Case = Callable[[], dict[str, Any]]


def kill_cases(world: World, number: int, made: dict[str, Any]) -> Iterator[tuple[str, Case]]:
    """`(name, case)` until `number` kills have landed by the results `made`, which the caller adds to in between."""
    kills: list[Kills] = []

    def case(index: int) -> dict[str, Any]:
        if not kills:
            kills.append(Kills(world))
        return kills[0].disturb(index)

    num_landed = 0
    for index in itertools.count():
        if num_landed >= number:
            return
        name = f"kill {index:03d}"
        yield name, lambda index=index: case(index)
        num_landed += len(made[name]["killed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--kills", type=int, default=60, help="that land")
    parser.add_argument("--cases", nargs="+", help="only those whose names begin so")
    parser.add_argument("--again", nargs="*", default=[], help="names of cases to repeat")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/faults")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plots.plot_run = lambda folder: []  # the same in every run, and half of its time
    world = World(options.work)
    world.make()
    results = read_results(options.results)
    cases = {
        "kills": lambda: kill_cases(world, options.kills, results["kills"]),
        "inputs": lambda: input_cases(world),
        "disks": lambda: disk_cases(world),
        "ranks": lambda: rank_cases(world),
    }
    bad = 0
    for part in options.only:
        for name, case in cases[part]():
            if options.cases and not name.startswith(tuple(options.cases)):
                continue
            if name not in results[part] or name in options.again:
                results[part][name] = portable(case(), options.work)
                add_result(options.results, part, name, results[part][name])
                print(f"{name}: {results[part][name]['outcome'][:300]}", flush=True)
            bad += results[part][name]["outcome"] not in GOOD
    print(summary(read_results(options.results)))
    return min(bad, 100)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """The cases of every part by name."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {part: found.get(part, {}) for part in PARTS}


def add_result(path: Path, part: str, name: str, record: dict[str, Any]) -> None:
    """Put one case into the file, which others may be adding to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        results = read_results(path)
        results[part][name] = record
        write_json(path, {"machine": describe_machine(), "summary": summary(results), **results})
    finally:
        os.close(folder)


def portable(record: dict[str, Any], work: Path) -> dict[str, Any]:
    """The record without the folders of this machine, which error lines name: whole, or cut off at their end."""
    text = json.dumps(record)
    for folder, name in ((work, "WORK"), (ROOT, "CHECKOUT")):
        text = text.replace(str(folder), name)
        text = re.sub(re.escape(str(folder)[:8]) + r'[^" ]*(?=")', name, text)
    return json.loads(text)


def summary(results: dict[str, Any]) -> dict[str, str]:
    lines = {
        part: f"{sum(case['outcome'] in GOOD for case in cases.values())} of {len(cases)} as they must"
        for part, cases in results.items()
    }
    lines["kills"] += f", {sum(len(case['killed']) for case in results['kills'].values())} kills landed"
    return lines


if __name__ == "__main__":
    sys.exit(main())

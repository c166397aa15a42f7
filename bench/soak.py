"""A long run of a tiny model on videos that fail at random: memory, open files and threads must stay flat.

    python bench/soak.py [--steps 2000] [--work DIR] [--results FILE]

The video files are damaged and mended while the run goes on, and none is kept in memory. The last quarter of the run is
compared with the third: exit code 1 when resident memory grew by over 5 %, or files or threads grew at all.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout runs without being installed
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

from tempsamp_fast.system.device import prepare_environment  # noqa: E402

prepare_environment()

from bench.fault_campaign.children import World, fresh  # noqa: E402
from tempsamp_fast import train  # noqa: E402
from tempsamp_fast.run.log import describe_machine, write_json  # noqa: E402
from tempsamp_fast.run.run import Run  # noqa: E402

RESULTS = ROOT / "bench/results/soak.json"


def measured() -> dict[str, int]:
    """Resident KiB, open files and threads of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = len(os.listdir("/proc/self/fd"))
    return {"resident_kib": int(status["VmRSS"].split()[0]), "files": files, "threads": int(status["Threads"])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/soak")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    world = World(options.work)
    world.make()
    videos = fresh(options.work / "videos")
    shutil.copytree(world.clips / "videos", videos)
    whole = {path: path.read_bytes() for path in sorted(videos.iterdir())}
    draw, samples, num_damaged, num_skipped = random.Random(0), [], 0, 0
    update = Run.update

    def update_and_measure(run: Run, at: Any, groups: Any) -> Any:
        nonlocal num_damaged, num_skipped
        metrics = update(run, at, groups)
        if at.step % max(1, options.steps // 200) == 0:
            samples.append({"step": at.step, **measured()})
        path = draw.choice(list(whole))
        damaged = draw.random() < 0.3
        num_damaged += damaged
        path.write_bytes(draw.randbytes(len(whole[path]) // 2) if damaged else whole[path])
        num_skipped += len(run.loader.skipped)
        run.loader.skipped.clear()  # as a run begun anew: every file may be whole again
        return metrics

    Run.update = update_and_measure  # type: ignore[method-assign]
    half = options.steps // 2
    settings = {"phases": f"sft:{half},tempsamp:{options.steps - half}", "save_steps": max(1, options.steps // 10)}
    train.main(world.flags(fresh(options.work / "run"), videos=videos, video_cache_gib=0, beta=0, **settings))
    quarter = len(samples) // 4
    report: dict[str, Any] = {}
    for name in ("resident_kib", "files", "threads"):
        before, after = (
            statistics.median(sample[name] for sample in part)
            for part in (samples[2 * quarter : 3 * quarter], samples[3 * quarter :])
        )
        report[name] = {"third quarter": before, "last quarter": after}
    memory = report["resident_kib"]
    flat = memory["last quarter"] <= 1.05 * memory["third quarter"]
    flat = flat and all(report[name]["last quarter"] <= report[name]["third quarter"] for name in ("files", "threads"))
    facts = {"steps": options.steps, "files damaged": num_damaged, "videos skipped": num_skipped, "flat": flat}
    write_json(options.results, {"machine": describe_machine(), **facts, **report, "samples": samples})
    print(facts, report)
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())

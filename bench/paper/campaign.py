"""Making the runs: the data once, a cold start per seed once, then each run in a process on one thread."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.paper import plan
from bench.paper.plan import Family, PlannedRun
from bench.paper.record import record_of
from bench.paper.results import check_same_settings, check_same_start, read_results
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.subsets import few_shot
from tempsamp_fast.embedded.videos import generate
from tempsamp_fast.evaluation.scoring import best_constant_span, score_rows
from tempsamp_fast.run.checkpoint import MODEL, latest_checkpoint
from tempsamp_fast.run.log import describe_machine, write_json

ROOT = Path(__file__).parents[2]


class Campaign:
    """Runs made in the folder `work`, their records kept in the file `results`.

    Raises ValueError when the file holds runs with other settings. Each record has the commit that made it; a cold
    start that is not in `work` any more is made again, and has to come out as it did for the runs that began from it.
    """

    def __init__(self, work: Path, results: Path):
        self.work, self.path = work, results
        self.data: dict[str, Path] = {}
        self._lock = threading.Lock()
        self._base_lock = threading.Lock()
        self._cold_locks = {seed: threading.Lock() for seed in (*plan.SEEDS, plan.PILOT_SEED)}
        machine, settings = describe_machine(), _settings()
        self.commit = machine.pop("commit")
        if results.exists():
            self.results = read_results(results)
            check_same_settings(results, self.results["settings"], settings)
        else:
            self.results = {"settings": settings, "machine": machine, "cold_starts": {}, "runs": {}}

    def make(self, num_workers: int, families: Sequence[Family] = plan.FAMILIES) -> None:
        """Make the runs of `families` that have no record yet, `num_workers` at a time: pilots, and what their best
        rate asks for.

        Raises ValueError for others than the pilots before these are in; RuntimeError when all others are made and one
        has failed.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        pilots = plan.pilot_runs()
        self.results |= {"planned": len(pilots) + len(plan.planned_runs(plan.PILOT_RATES[0]))}
        if "pilot" not in families and any(run.name not in self.results["runs"] for run in pilots):
            raise ValueError(f"{self.path}: --only {' '.join(families)}: the pilots choose the rate, make them first")
        self._prepare_data(num_workers)
        if "pilot" in families:
            self.make_runs(pilots, num_workers)
        rate = best_rate(self.results["runs"])
        self.results |= {"rate": rate}
        self.make_runs([run for run in plan.planned_runs(rate) if run.family in families], num_workers)

    def make_runs(self, runs: Sequence[PlannedRun], num_workers: int) -> None:
        """Make those that have no record yet. Raises RuntimeError when all others are made and one has failed."""
        missing = [run for run in runs if run.name not in self.results["runs"]]
        with ThreadPoolExecutor(num_workers) as executor:
            futures = [executor.submit(self._make, run) for run in missing]
        failed = [str(error) for future in futures if (error := future.exception())]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed; the first: {failed[0]}")

    def _prepare_data(self, num_workers: int) -> None:
        for name, config in plan.DATA.items():
            self.data[name] = generate(self.work / "data" / name, config, num_workers)
        self.samples, test = (load_annotations(_annotations(self.data["hard"], split)) for split in ("train", "test"))
        span, _ = best_constant_span(self.samples)
        scores = score_rows(test, [{"span": list(span)}] * len(test), "grounding")
        self.results |= {"num_queries": len(test), "constant_span": {"span": span, **scores}}

    def _make(self, run: PlannedRun) -> None:
        folder = self.work / run.name
        flags = {**run.flags, "model": self._cold_start(run.seed), "seed": run.seed}
        if run.num_videos:
            flags |= self._few_shot(run)
        cost = self._train(folder, self.data["hard"], flags)
        shown = {name: value for name, value in dataclasses.asdict(run).items() if name != "flags"}
        with self._lock:
            self.results["runs"][run.name] = {**shown, **record_of(folder), **cost, "commit": self.commit}
            self._write()
        shutil.rmtree(folder / "checkpoints")
        done = self.results["done"]
        score = self.results["runs"][run.name]["evaluations"]["answer"][-1]["miou"]
        print(f"{done}/{self.results['planned']} {run.name}: mIoU {score:.3f}, {cost['cpu_s']:.0f} CPU s", flush=True)

    def _cold_start(self, seed: int) -> Path:
        """The checkpoint that all runs of a seed start from; made by whichever comes first."""
        folder = self.work / f"cold_start/seed{seed}"
        with self._cold_locks[seed]:
            if str(seed) not in self.results["cold_starts"] or not folder.exists():
                flags = {**plan.COLD_START, "model": self._base(), "seed": seed + plan.COLD_START_SEED}
                self._keep_start(str(seed), folder, self._train(folder, self.data["hard"], flags))
            return latest_checkpoint(folder)[0] / MODEL

    def _base(self) -> Path:
        """The checkpoint that all cold starts come from."""
        folder = self.work / "base"
        with self._base_lock:
            if "base" not in self.results["cold_starts"] or not folder.exists():
                self._keep_start("base", folder, self._train(folder, self.data["easy"], plan.BASE))
            return latest_checkpoint(folder)[0] / MODEL

    def _keep_start(self, name: str, folder: Path, cost: dict[str, float]) -> None:
        with self._lock:
            scores = record_of(folder)["evaluations"]["answer"][-1]
            check_same_start(name, self.results["cold_starts"].get(name), scores)
            self.results["cold_starts"][name] = {**scores, **cost}
            self._write()
        print(f"{name}: mIoU {scores['miou']:.3f}, {cost['cpu_s']:.0f} CPU s", flush=True)

    def _few_shot(self, run: PlannedRun) -> dict[str, object]:
        assert run.num_videos is not None
        num_queries = len(few_shot(self.samples, run.num_videos, run.seed))
        subset = {"few_shot_videos": run.num_videos, "few_shot_seed": run.seed}
        return {**subset, "phases": plan.few_shot_phases(run.method, num_queries, run.rate)}

    def _train(self, folder: Path, data: Path, flags: dict[str, object]) -> dict[str, float]:
        """Run the trainer in a fresh folder; returns what it cost. Raises RuntimeError with the end of its output."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        files = {"annotations": _annotations(data, "train"), "eval_annotations": _annotations(data, "test")}
        kept = {"videos": data / "videos", "patch_cache": self.work / "patches", "output_dir": folder}
        command = [sys.executable, str(ROOT / "tempsamp_fast/train.py"), *plan.words({**flags, **files, **kept})]
        python_path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
        started = time.monotonic()
        with folder.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells what the process used
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            end = folder.with_suffix(".log").read_text()[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
        return {
            "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
            "wall_s": round(time.monotonic() - started, 1),
        }

    def _write(self) -> None:
        """With what another campaign has added to the file meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                kept = read_results(self.path)
                self.results |= {part: kept[part] | self.results[part] for part in ("cold_starts", "runs")}
            self.results["done"] = len(self.results["runs"])
            write_json(self.path, self.results)
        finally:
            os.close(lock)


def best_rate(runs: dict[str, dict[str, Any]]) -> float:
    """The rate at which the pilots of all methods have the highest mean mIoU."""
    by_rate: dict[float, list[float]] = {}
    for record in runs.values():
        if record["family"] == "pilot":
            by_rate.setdefault(record["rate"], []).append(record["evaluations"]["answer"][-1]["miou"])
    return max(by_rate, key=lambda rate: statistics.mean(by_rate[rate]))


def _annotations(data: Path, split: str) -> Path:
    return data / f"annotations/{split}.json"


def _settings() -> dict[str, Any]:
    """What is the same for all runs, as JSON gives it back."""
    settings = {
        "data": {name: dataclasses.asdict(config) for name, config in plan.DATA.items()},
        "common": plan.COMMON,
        "base": plan.BASE,
        "cold_start": plan.COLD_START,
        "stages": plan.STAGES,
        "stage_shares": plan.STAGE_SHARES,
        "pilot_rates": plan.PILOT_RATES,
    }
    return json.loads(json.dumps(settings))

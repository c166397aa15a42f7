"""Making the runs: the data once, a cold start per seed once, then each run in a process on one thread."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.paper import plan
from bench.paper.plan import PlannedRun
from bench.paper.record import record_of
from bench.paper.results import check_same, read_results
from tempsamp_fast.annotations import load_annotations
from tempsamp_fast.checkpoint import MODEL, latest_checkpoint
from tempsamp_fast.runlog import describe_machine, write_json
from tempsamp_fast.score import best_constant_span, score_rows
from tempsamp_fast.subsets import few_shot
from tempsamp_fast.synthetic import generate

ROOT = Path(__file__).parents[2]


class Campaign:
    """Runs made in the folder `work`, their records kept in the file `results`.

    Raises ValueError when the file holds runs of another commit or with other settings.
    """

    def __init__(self, work: Path, results: Path):
        self.work, self.path = work, results
        self._lock = threading.Lock()
        self._cold_locks = {seed: threading.Lock() for seed in plan.SEEDS}
        machine = describe_machine()
        made_of = {"commit": machine.pop("commit"), "settings": _settings()}
        if results.exists():
            self.results = read_results(results)
            check_same(results, self.results, made_of)
        else:
            self.results = {**made_of, "machine": machine, "cold_starts": {}, "runs": {}}

    def make(self, runs: Sequence[PlannedRun], num_workers: int) -> None:
        """Make the runs that have no record yet, `num_workers` at a time. Raises RuntimeError for one that fails."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.results |= {"planned": len(runs)}
        self._prepare_data(num_workers)
        missing = [run for run in runs if run.name not in self.results["runs"]]
        with ThreadPoolExecutor(num_workers) as executor:
            futures = [executor.submit(self._make, run) for run in missing]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise

    def _prepare_data(self, num_workers: int) -> None:
        folder = generate(self.work / "data", plan.DATA, num_workers)
        self.videos = folder / "videos"
        self.train, self.test = (folder / f"annotations/{split}.json" for split in ("train", "test"))
        self.samples = load_annotations(self.train, self.videos)
        test = load_annotations(self.test, self.videos)
        span, _ = best_constant_span(self.samples)
        scores = score_rows(test, [{"span": list(span)}] * len(test), "grounding")
        self.results |= {"num_queries": len(test), "constant_span": {"span": span, **scores}}

    def _make(self, run: PlannedRun) -> None:
        cold_start = self._cold_start(run.seed)
        flags = {**plan.COMMON, **run.flags, "model": cold_start, "seed": run.seed}
        if run.num_videos:
            flags |= self._few_shot(run)
        folder = self.work / run.name
        cost = self._train(folder, flags)
        shown = {name: value for name, value in dataclasses.asdict(run).items() if name != "flags"}
        with self._lock:
            self.results["runs"][run.name] = {**shown, **record_of(folder), **cost}
            self._write()
        shutil.rmtree(folder / "checkpoints")
        done = self.results["done"]
        score = self.results["runs"][run.name]["evaluations"]["answer"][-1]["miou"]
        print(f"{done}/{self.results['planned']} {run.name}: mIoU {score:.3f}, {cost['cpu_s']:.0f} CPU s", flush=True)

    def _cold_start(self, seed: int) -> Path:
        """The checkpoint that all runs of a seed start from; made by whichever comes first."""
        folder = self.work / f"cold_start/seed{seed}"
        with self._cold_locks[seed]:
            if str(seed) not in self.results["cold_starts"]:
                flags = {**plan.COMMON, **plan.COLD_START, "seed": seed + plan.COLD_START_SEED}
                cost = self._train(folder, flags)
                with self._lock:
                    self.results["cold_starts"][str(seed)] = {**record_of(folder)["evaluations"]["answer"][-1], **cost}
                    self._write()
            return latest_checkpoint(folder)[0] / MODEL

    def _few_shot(self, run: PlannedRun) -> dict[str, object]:
        """The seed's videos of the subset, and as many steps as take all of their queries `FEW_SHOT_EPOCHS` times."""
        assert run.num_videos is not None
        samples = few_shot(self.samples, run.num_videos, run.seed)
        kept = {sample.video_id for sample in samples}
        every = json.loads(self.train.read_text())
        annotations = self.work / f"few_shot/{run.num_videos}_videos_seed{run.seed}.json"
        annotations.parent.mkdir(exist_ok=True)
        write_json(annotations, {video: entry for video, entry in every.items() if video in kept})
        batch = int(str(plan.COMMON["prompts_per_device"]))
        steps = math.ceil(plan.FEW_SHOT_EPOCHS * len(samples) / batch)
        return {"annotations": annotations, "phases": plan.phases(run.method, ["answer"], [steps])}

    def _train(self, folder: Path, flags: dict[str, object]) -> dict[str, float]:
        """Run the trainer in a fresh folder; returns what it cost. Raises RuntimeError with the end of its output."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        data = {"annotations": self.train, "eval_annotations": self.test, "videos": self.videos}
        every = {**data, "patch_cache": self.work / "patches", "eval_modes": "answer", **flags, "output_dir": folder}
        command = [sys.executable, str(ROOT / "tempsamp_fast/train.py"), *(f"--{k}={v}" for k, v in every.items())]
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
        self.results["done"] = len(self.results["runs"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)


def _settings() -> dict[str, Any]:
    """What is the same for all runs, as JSON gives it back."""
    settings = {
        "data": dataclasses.asdict(plan.DATA),
        "common": plan.COMMON,
        "cold_start": plan.COLD_START,
        "stages": plan.STAGES,
        "rates": plan.RATES,
    }
    return json.loads(json.dumps(settings))

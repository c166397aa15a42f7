"""Making the runs: the data once, a cold start per seed once, then each run in a process on one thread."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
import random
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
from bench.paper.plan import PlannedRun
from bench.paper.record import record_of
from bench.paper.results import check_same_settings, check_same_start, read_results
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.subsets import few_shot
from tempsamp_fast.embedded.videos import generate
from tempsamp_fast.evaluation.scoring import best_constant_span, score_rows
from tempsamp_fast.run.checkpoint import MODEL, latest_checkpoint
from tempsamp_fast.run.log import describe_machine, write_json

ROOT = Path(__file__).parents[2]
SUMMARY = "summary.json"
"""What a run writes when all its steps are done."""


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
        seeds = (*plan.SEEDS, plan.PILOT_SEED)
        self._start_locks = {(kind, seed): threading.Lock() for kind in plan.STARTS for seed in seeds}
        machine, settings = describe_machine(), _settings()
        self.commit = machine.pop("commit")
        if results.exists():
            self.results = read_results(results)
            check_same_settings(results, self.results["settings"], settings)
        else:
            self.results = {"settings": settings, "machine": machine, "cold_starts": {}, "runs": {}}

    def make(self, num_workers: int, only: Sequence[str], rate: float | None = None) -> None:
        """Make the runs that have no record yet and whose names begin with one of `only`, `num_workers` at a time:
        pilots, and what their best rate asks for.

        rate: of all runs, where an earlier campaign's pilots have chosen it.
        Raises ValueError for others than the pilots before these are in, for a rate that is not the one so far and for
        names of no run; RuntimeError when all others are made and one has failed.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        pilots = plan.pilot_runs()
        every = [*pilots, *plan.planned_runs(plan.PILOT_RATES[0])]
        self.results |= {"planned": len(every)}
        wanted = lambda runs: [run for run in runs if f"{run.name}/".startswith(tuple(f"{each}/" for each in only))]
        if not wanted(every):
            raise ValueError(f"--only {' '.join(only)}: no such runs; --list prints all, first the families")
        if (kept := self.results.setdefault("given_rate", rate)) != rate:
            raise ValueError(f"{self.path}: its runs have {'the rate of pilots' if kept is None else kept}, not {rate}")
        made = {*self.results["runs"], *(run.name for run in wanted(pilots))}
        if rate is None and any(run.name not in made for run in pilots):
            raise ValueError(f"{self.path}: --only {' '.join(only)}: the pilots choose the rate, make them first")
        self._prepare_data(num_workers)
        self.make_runs(wanted(pilots) if rate is None else [], num_workers)
        rate = rate or best_rate(self.results["runs"])
        self.results |= {"rate": rate}
        self.make_runs(wanted(plan.planned_runs(rate)), num_workers)

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
        folder, start = self.work / run.name, self._start(run.start, run.seed)
        made: dict[str, Any] = {}
        if run.method != plan.START:
            flags = {**run.flags, "model": start, "seed": run.seed}
            if run.num_videos:
                flags |= self._few_shot(run)
            if run.noise:
                flags["annotations"] = self._jittered(run.noise)
            cost = self._train(folder, self.data["hard"], flags)
            made = {**record_of(folder), **cost}
        if run.tests:
            model = start if run.method == plan.START else folder
            made["tests"] = {name: self._test(model, folder / "tests" / name, name) for name in run.tests}
        shown = {name: value for name, value in dataclasses.asdict(run).items() if name not in ("flags", "tests")}
        with self._lock:
            self.results["runs"][run.name] = {**shown, **made, "commit": self.commit}
            self._write()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        score = made["evaluations"]["answer"][-1]["miou"] if "evaluations" in made else made["tests"]
        print(f"{self.results['done']}/{self.results['planned']} {run.name}: mIoU {score}", flush=True)

    def _start(self, kind: str, seed: int) -> Path:
        """The checkpoint that all runs of a seed start from; made by whichever comes first."""
        name, folder = f"{'' if kind == 'cold' else f'{kind} '}{seed}", self.work / f"{kind}_start/seed{seed}"
        with self._start_locks[kind, seed]:
            flags = {**plan.STARTS[kind], "model": self._base(), "seed": seed + plan.COLD_START_SEED}
            return self._whole_start(name, folder, self.data["hard"], flags)

    def _base(self) -> Path:
        """The checkpoint that all cold starts come from."""
        with self._base_lock:
            return self._whole_start("base", self.work / "base", self.data["easy"], plan.BASE)

    def _whole_start(self, name: str, folder: Path, data: Path, flags: dict[str, object]) -> Path:
        """Trained where it does not lie there whole; either way it has to be what earlier runs began from."""
        cost = {} if (folder / SUMMARY).exists() else self._train(folder, data, flags)
        with self._lock:
            kept, scores = self.results["cold_starts"].get(name), record_of(folder)["evaluations"]["answer"][-1]
            check_same_start(name, kept, scores)
            if cost or not kept:
                self.results["cold_starts"][name] = {**scores, **cost}
                self._write()
                print(f"{name}: mIoU {scores['miou']:.3f}", flush=True)
        return latest_checkpoint(folder)[0] / MODEL

    def _few_shot(self, run: PlannedRun) -> dict[str, object]:
        assert run.num_videos is not None
        num_queries = len(few_shot(self.samples, run.num_videos, run.seed))
        subset = {"few_shot_videos": run.num_videos, "few_shot_seed": run.seed}
        return {**subset, "phases": plan.few_shot_phases(run.method, num_queries, run.rate)}

    def _jittered(self, noise: float) -> Path:
        """The hard videos' training annotations with errors."""
        path = self.work / f"noise{noise:g}.json"
        with self._lock:
            write_json(path, jittered(json.loads(_annotations(self.data["hard"], "train").read_text()), noise))
        return path

    def _test(self, model: Path, out: Path, name: str) -> dict[str, float]:
        """Scores of a checkpoint or run on one of TESTS, by `tempsamp_fast/eval.py`."""
        config, mode = plan.TESTS[name]
        with self._lock:
            data = generate(self.work / "tests" / name, dataclasses.replace(config, num_train=0), 1)
        words = {"model": model, "annotations": _annotations(data, "test"), "videos": data / "videos", "output": out}
        words |= {"mode": mode, "max_completion_length": 64, "batch_size": plan.COMMON["eval_batch_size"]}
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        _run("tempsamp_fast/eval.py", [f"--{key}={value}" for key, value in words.items()], out.with_suffix(".log"))
        return json.loads((out / "scores.json").read_text())["rows"][0]

    def _train(self, folder: Path, data: Path, flags: dict[str, object]) -> dict[str, float]:
        """Run the trainer in a fresh folder; returns what it cost. Raises RuntimeError with the end of its output."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        files = {"annotations": _annotations(data, "train"), "eval_annotations": _annotations(data, "test")}
        kept = {"videos": data / "videos", "patch_cache": self.work / "patches", "output_dir": folder}
        return _run("tempsamp_fast/train.py", plan.words({**files, **kept, **flags}), folder.with_suffix(".log"))

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


def jittered(annotations: dict[str, Any], noise: float, seed: int = 0) -> dict[str, Any]:
    """Starts and ends moved by normal errors, their deviation `noise` times the event's length, in order and in the
    video; what is left of an event is at least a tenth of a second.
    """
    rng = random.Random(seed)
    changed = copy.deepcopy(annotations)
    for video in changed.values():
        for span in video["timestamps"]:
            length = span[1] - span[0]
            ends = sorted(min(max(end + rng.gauss(0, noise * length), 0), video["duration"]) for end in span)
            span[:] = [round(min(ends[0], video["duration"] - 0.1), 2), round(max(ends[1], ends[0] + 0.1), 2)]
    return changed


def _run(script: str, words: Sequence[str], log_path: Path) -> dict[str, float]:
    """Run a script on one thread; returns what it cost. Raises RuntimeError with the end of its output."""
    command = [sys.executable, str(ROOT / script), *words]
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    started = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells what the process used
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log_path.read_text()[-2000:]}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def _annotations(data: Path, split: str) -> Path:
    return data / f"annotations/{split}.json"


def _settings() -> dict[str, Any]:
    """What is the same for all runs, as JSON gives it back."""
    settings = {
        "data": {name: dataclasses.asdict(config) for name, config in plan.DATA.items()},
        "common": plan.COMMON,
        "base": plan.BASE,
        "cold_start": plan.COLD_START,
        "starts": plan.STARTS,
        "far": dataclasses.asdict(plan.FAR),
        "stages": plan.STAGES,
        "stage_shares": plan.STAGE_SHARES,
        "pilot_rates": plan.PILOT_RATES,
    }
    return json.loads(json.dumps(settings))

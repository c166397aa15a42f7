"""Videos for runs of the trainer, and the runs: processes of their own, one thread each, several under one bar."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import parse_phases
from tempsamp_fast.embedded.data import draw_data_set
from tempsamp_fast.embedded.videos import SyntheticConfig
from tempsamp_fast.report.plots import EVAL_PHASE, read_rows
from tempsamp_fast.system.files import own_folder
from tempsamp_fast.system.progress import EVERY_S, Progress

POLL_S = 1.0
FINISHED = "summary.json"
"""What a run writes last but for its plots."""
MOST_SAID = 2000
"""Characters of the end of what it printed."""
_Process = subprocess.Popen[bytes]


def draw(data: Path, videos: SyntheticConfig) -> list[str]:
    """Draw the videos that are missing in the folder `data`; returns the trainer's words that name its files."""
    draw_data_set(own_folder(data), videos)
    files = {"annotations": "annotations/train.json", "eval_annotations": "annotations/test.json", "videos": "videos"}
    return [*(f"--{name}={data / file}" for name, file in files.items()), f"--patch_cache={data / 'patches'}"]


def train_all(folder: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Train `runs`, the trainer's words by name, into folders of those names in `folder`, as many at a time as cores.

    One that was begun before goes on, a finished one stays. What they print is in FOLDER/NAME.log. Raises RuntimeError
    with the end of that of a run that failed, and ValueError for one that was begun with other words.
    """
    for name, words in runs.items():
        _check_begun(folder / name, words)
    waiting, running = [name for name in runs if not (folder / name / FINISHED).exists()], dict[str, _Process]()
    try:
        with Progress(sum(map(_num_steps, runs.values())), _steps_done(folder, runs), EVERY_S) as progress:
            while waiting or running:
                while waiting and len(running) < len(os.sched_getaffinity(0)):
                    name = waiting.pop(0)
                    running[name] = _start(folder / name, runs[name])
                time.sleep(POLL_S)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        end = (folder / f"{name}.log").read_text()[-MOST_SAID:]
                        raise RuntimeError(f"{name} failed; the end of {folder / name}.log:\n{end}")
                done = {name: float(_steps_done(folder, [name])) for name in running}
                by = _steps_done(folder, runs) - progress.done
                label = "training, steps" if progress.done + by < progress.total else "last evaluations, steps"
                progress.update(label, done, by)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _check_begun(folder: Path, words: Sequence[str]) -> None:
    log = folder.with_suffix(".log")
    begun = shlex.split(log.read_text().partition("\n")[0]) if log.exists() else []
    if begun and [word for word in begun if word in words] != [*words]:
        raise ValueError(f"{folder}: was begun otherwise ({shlex.join(begun)[:MOST_SAID]}); choose another folder")


def _start(folder: Path, words: Sequence[str]) -> _Process:
    place = "resume" if (folder / "config.json").exists() else "output_dir"
    command = [sys.executable, "-m", "tempsamp_fast.train", *words, f"--{place}={folder}"]
    with folder.with_suffix(".log").open("a") as log:
        log.write(f"{shlex.join(command)}\n")
        log.flush()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _num_steps(words: Sequence[str]) -> int:
    return sum(phase.num_steps for phase in parse_phases(parse_args(words).train.phases))


def _steps_done(folder: Path, names: Iterable[str]) -> int:
    rows = [row for name in names for row in read_rows(folder / name / "metrics.jsonl")]
    return sum(row["phase"] != EVAL_PHASE for row in rows)

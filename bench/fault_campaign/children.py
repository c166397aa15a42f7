"""Trainer processes to do harm to: forked from one that has imported everything, so that each starts in no time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempsamp_fast import train
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.prompts import off_policy_text, question
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.embedded.videos import SyntheticConfig, generate
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.system.device import free_port

CLIPS = SyntheticConfig(
    num_train=6, num_val=0, num_test=2, min_duration_s=8.0, max_duration_s=10.0, sizes=("64x48", "48x64")
)
SETTINGS = {
    "dtype": "float32",
    "fps": 1,
    "min_pixels": 3136,
    "max_pixels": 3136,
    "max_eval_samples": 1,
    "num_generations": 3,
    "max_completion_length": 6,
    "prompts_per_device": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "beta": 0.04,
    "phases": "sft:2,tempsamp:3",
    "eval_modes": "answer",
    "save_steps": 1,
    "on_bad_sample": "skip",
}
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
TIMEOUT_S = 240


@dataclass(frozen=True)
class World:
    """The data and the model that all runs share, made once in `folder`."""

    folder: Path

    @property
    def clips(self) -> Path:
        return self.folder / "clips"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def make(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        generate(self.clips, CLIPS, num_workers=1)
        samples = load_annotations(self.clips / "annotations/train.json", self.clips / "videos")
        texts = [question(sample.query, mode) for sample in samples for mode in ("answer", "think")]
        texts += [off_policy_text(sample, mode) or "" for sample in samples for mode in ("answer", "think")]
        if not (self.model / "tokenizer.json").exists():
            build_tiny_checkpoint(self.model, texts)

    def flags(self, run: Path, **settings: object) -> list[str]:
        paths = {
            "model": self.model,
            "annotations": self.clips / "annotations/train.json",
            "eval_annotations": self.clips / "annotations/test.json",
            "videos": self.clips / "videos",
            "output_dir": run,
        }
        return [f"--{name}={value}" for name, value in {**SETTINGS, **paths, **settings}.items()]


@dataclass
class Child:
    """One rank in a process of its own; what it prints goes to `log`."""

    pid: int
    log: Path
    started_s: float

    def wait(self) -> int:
        """Its exit code, negative for a signal; TimeoutError, and its end, after `TIMEOUT_S`."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"{self.log}: not done in {TIMEOUT_S} s")

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(
    words: Sequence[str],
    log: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    port: int | None = None,
    kill_at: tuple[Path, int] | None = None,
    main: Callable[[list[str]], object] = train.main,
) -> Child:
    """Fork a process that trains; with `kill_at` it ends itself by SIGKILL before its n-th change in a folder.

    A change is the opening of a file to write, a rename, a deletion or a new folder.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    pid = os.fork()
    if pid:
        return Child(pid, log, time.monotonic())
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ["MASTER_PORT"] = str(port)
        if kill_at:
            sys.addaudithook(_killer(*kill_at))
        main(list(words))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _killer(folder: Path, number: int) -> Any:
    seen = 0
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(inside):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        seen += 1
        if number == 0:
            os.write(2, b"change\n")
        elif seen == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def record(run: Path) -> dict[str, Any]:
    """What must be equal in a disturbed and an undisturbed run."""
    rows = [
        {name: repr(value) for name, value in row.items() if not name.startswith(("time/", "perf/"))}
        for row in read_metrics(run)
    ]
    newest, step = latest_checkpoint(run)
    weights = hashlib.sha256((newest / "model/model.safetensors").read_bytes()).hexdigest()
    return {
        "rows": rows,
        "step": step,
        "weights": weights,
        "groups": (run / "groups.jsonl").read_text(),
        "results": json.loads((run / "results.json").read_text()),
    }


def difference(run: Path, undisturbed: dict[str, Any]) -> str:
    """Empty where the run is the undisturbed one to the bit."""
    found = record(run)
    return ", ".join(name for name in undisturbed if found[name] != undisturbed[name])


def words_to_go_on(world: World, run: Path, **settings: object) -> list[str]:
    """What a user types after a crash: `--resume`, or the same command where the run had not begun."""
    if (run / "config.json").exists():
        return [f"--resume={run}"]
    return world.flags(run, **settings)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder

"""The record of a run: its folder, resolved configuration, metrics.jsonl, and the views of it."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.config import Config
from tempsamp_fast.config.reward_terms import parse_rewards
from tempsamp_fast.run.answers import lines_of, sampled_groups, texts_of
from tempsamp_fast.system.files import open_to_append, own_folder, read_bytes, write_file
from tempsamp_fast.system.progress import Progress, columns

logger = logging.getLogger(__name__)

SHOWN = {
    "reward/on_policy_mean": "reward",
    "loss": "loss",
    "reward/tiou": "iou",
    "optim/grad_norm": "grad",
    "time/step_s": "s/step",
    "perf/tokens_per_s": "tok/s",
    "perf/mfu": "mfu",
    "batch/tree_saving": "tree x",
}
MOST_OF_RECORD = 1 << 32
"""Bytes."""
ZERO_STEPS = 5
"""So many steps in a row without any reward are told."""
RECORDS = ("metrics.jsonl", "groups.jsonl", "results.json", "config.json")
"""Files of a run folder that a checkpoint counts on: they are on the disk before it is."""
PACKAGES = ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "torchcodec", "trl")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` as `write_file` does."""
    write_file(path, json.dumps(value, indent=2) + "\n")


def describe_machine() -> dict[str, Any]:
    """Versions, hardware and the commit of the code, for the run folder."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "platform": platform.platform(),
        "num_threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "commit": commit_of_code(),
    }


def own_files(config: Config) -> dict[str, dict[str, str]]:
    """SHA-256 of the user's files that a run works by: of `rewards` and `prompt_file`, each by its path."""
    files = {
        "rewards": [term.file for term in parse_rewards(config.algorithm.rewards) if term.file],
        "prompt_file": [config.data.prompt_file] if config.data.prompt_file else [],
    }
    return {
        setting: {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
        for setting, paths in files.items()
    }


def commit_of_code() -> str | None:
    """Hash of the commit that is checked out; None where git or its repository is missing."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() or None


class RunLog:
    """Writes RUN/metrics.jsonl (the record) and shows it as a progress bar and TensorBoard events.

    Rows of steps at or after `first_step` are dropped when a run is resumed. Only the rank that is `active` writes.
    """

    def __init__(self, folder: Path, config: Config, total_steps: int, first_step: int, active: bool):
        self.folder, self._config = folder, config
        self.active = active
        if not active:
            return
        own_folder(folder, may_be_link=True)
        records = [folder / "metrics.jsonl", folder / "groups.jsonl"]
        for path in records:
            drop_rows_from(path, first_step)
        self._metrics, self._groups = map(open_to_append, records)
        write_json(folder / "config.json", config.as_dict())
        write_json(folder / "machine.json", describe_machine() | {"own_files": own_files(config)})
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(own_folder(folder / "tensorboard")), purge_step=first_step)
        self._progress = Progress(total_steps, first_step)
        self._num_zero = 0

    def log(self, step: int, phase: str, metrics: dict[str, float], advance: bool = True) -> None:
        """Append one row; `advance` moves the progress bar by a step."""
        if not self.active:
            return
        self._metrics.write(json.dumps({"step": step, "phase": phase, **metrics}) + "\n")
        self._metrics.flush()
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)
        if advance:
            self._progress.update(phase, {short: metrics[name] for name, short in SHOWN.items() if name in metrics})
            self._watch_rewards(step, metrics)

    def _watch_rewards(self, step: int, metrics: dict[str, float]) -> None:
        self._num_zero = self._num_zero + 1 if metrics.get("reward/on_policy_mean") == 0 else 0
        if self._num_zero == ZERO_STEPS:
            logger.warning(
                "no sampled answer earned anything in the %d steps up to step %d (cut off: %.0f %%): look at them in "
                "groups.jsonl, at max_completion_length and require_tags, or begin with an sft phase",
                ZERO_STEPS, step, 100 * metrics.get("completion/cut_share", 0.0),
            )  # fmt: skip

    def log_groups(self, step: int, phase: str, groups: Sequence[RolloutGroup]) -> None:
        """Append to RUN/groups.jsonl every group of this rank that has rewards, for the report's distributions.

        Of some of them the texts too; those of one are shown, as often as `show_completions` says.
        """
        if not self.active:
            return
        train = self._config.train
        with_texts = sampled_groups(groups, step, train.log_completions)
        for group in groups:
            answers = group.completions
            if answers[0].rewards and group.advantages is not None:
                row = {
                    "rewards": {name: [answer.rewards[name] for answer in answers] for name in answers[0].rewards},
                    "advantages": group.advantages.tolist(),
                    "is_off_policy": [answer.is_off_policy for answer in answers],
                }
                if any(group is each for each in with_texts):
                    row |= texts_of(group)
                self._groups.write(json.dumps({"step": step, "phase": phase, **row}) + "\n")
        self._groups.flush()
        rewarded = [group for group in groups if group.completions[0].rewards]
        if rewarded and train.show_completions and step % train.show_completions == 0:
            lines = lines_of(sampled_groups(rewarded, step, 1)[0], self._config.algorithm.rewards, columns())
            logger.info("%s, step %d:\n%s", phase, step, "\n".join(lines))

    def __enter__(self) -> RunLog:
        if self.active:
            self._progress.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            for file in (self._metrics, self._groups):
                file.close()
            self._progress.__exit__()
            self._tensorboard.close()


def drop_rows_from(path: Path, first_step: int) -> None:
    """Cut a JSONL record back to what was there after `first_step` steps; a last line that was cut off goes too."""
    if not path.is_file():
        return
    try:
        *lines, _ = read_bytes(path, MOST_OF_RECORD).decode().split("\n")
        kept = [line + "\n" for line in lines if _is_before(json.loads(line), first_step)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: the record cannot be read: {error}") from error
    write_file(path, "".join(kept))


def _is_before(row: dict[str, Any], first_step: int) -> bool:
    """The evaluation after n steps is row n, and it comes before the checkpoint of n steps."""
    return row["step"] < first_step or (row.get("phase") == "eval" and row["step"] == first_step > 0)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of RUN/metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

"""Runs read back from their folders, named by the settings in which they differ, and their scores with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tempsamp_fast.plots import eval_files, read_rows
from tempsamp_fast.sample import Mode
from tempsamp_fast.score import grounding_scores

NOT_A_METHOD = {"seed", "output_dir", "resume", "local_rank", "record_rollouts", "replay_rollouts", "synthetic_dir"}
"""Settings that tell runs of one method apart."""

STUDENT_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""97.5 % quantile of Student's t for 1 to 20 degrees of freedom."""
NORMAL_975 = 1.960


@dataclass(frozen=True)
class RunRecord:
    """What a run left in its folder."""

    folder: Path
    method: str
    """The settings in which it differs from the other runs of the report; equal for runs that differ by seed only."""
    seed: int
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    groups: list[dict[str, Any]]
    """Rows of groups.jsonl: step, phase, and per answer `rewards` by name, `advantages`, `is_off_policy`."""
    answers: dict[str, list[dict[str, Any]]]
    """The last evaluation's answers by mode."""

    @property
    def label(self) -> str:
        return f"{self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one method in one mode."""

    method: str
    mode: str
    seeds: tuple[int, ...]
    scores: dict[str, Interval]
    """By metric. Over the seeds; over the queries when there is one seed."""
    gain: Interval | None
    """mIoU minus that of the first method, paired by seed; None with fewer than two common seeds."""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in `folders`. Raises ValueError naming a folder that holds none."""
    configs = []
    for folder in folders:
        for name in ("config.json", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: not a run folder, it has no {name}")
        configs.append(json.loads((folder / "config.json").read_text()))
    return [
        RunRecord(
            folder=folder,
            method=method,
            seed=config["train"]["seed"],
            config=config,
            metrics=read_rows(folder / "metrics.jsonl"),
            groups=read_rows(folder / "groups.jsonl"),
            answers={mode: read_rows(files[-1]) for mode in get_args(Mode) if (files := eval_files(folder, mode))},
        )
        for folder, config, method in zip(folders, configs, name_methods(configs, folders), strict=True)
    ]


def name_methods(configs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[str]:
    """A name for each configuration made of the settings in which they differ; the folder's name where none does."""
    settings = [
        {name: value for section in config.values() for name, value in section.items() if name not in NOT_A_METHOD}
        for config in configs
    ]
    differing = [name for name in settings[0] if any(each.get(name) != settings[0][name] for each in settings)]
    if not differing:
        return [folders[0].name] * len(settings)
    return [", ".join(f"{name}={each.get(name)}" for name in differing) for each in settings]


def by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each method, in the order in which the methods first occur."""
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and the half-width of its 95 % interval (Student's t); nan for a single value."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan)
    quantile = STUDENT_T_975[count - 2] if count - 2 < len(STUDENT_T_975) else NORMAL_975
    return Interval(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count))


def score_table(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """A row per mode and method, the methods of a mode together."""
    methods = by_method(runs)
    rows = []
    for mode in get_args(Mode):
        baseline: dict[int, float] = {}
        for method, members in methods.items():
            members = [run for run in members if mode in run.answers]
            if not members:
                continue
            scores = [grounding_scores(_ious(run.answers[mode])) for run in members]
            miou = {run.seed: score["miou"] for run, score in zip(members, scores, strict=True)}
            baseline = baseline or miou
            gains = [value - baseline[seed] for seed, value in miou.items() if seed in baseline]
            seeds = tuple(run.seed for run in members)
            names = scores[0]
            intervals = {name: interval([score[name] for score in scores]) for name in names}
            if len(members) == 1:
                intervals = over_queries(_ious(members[0].answers[mode]))
            gain = interval(gains) if len(gains) > 1 and miou is not baseline else None
            rows.append(ScoreRow(method, mode, seeds, intervals, gain))
    return rows


def over_queries(ious: Sequence[float | None]) -> dict[str, Interval]:
    """`grounding_scores` of one run, its intervals over the queries."""
    per_query = [grounding_scores([iou]) for iou in ious]
    return {name: interval([scores[name] for scores in per_query]) for name in per_query[0]}


def _ious(answers: Sequence[dict[str, Any]]) -> list[float | None]:
    return [None if row["span"] is None else row["iou"] for row in answers]

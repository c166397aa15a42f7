"""Runs read back from their folders, named by the settings in which they differ, and their scores with intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tempsamp_fast.evaluation.scoring import answered_ious, grounding_scores, oracle_ious
from tempsamp_fast.report.plots import eval_files, read_rows
from tempsamp_fast.sample import Mode, Task
from tempsamp_fast.system.files import read_json

ORACLE = "oracle of both"
"""Of a query's answers in both modes the better one, by its IoU: the paper's "mixed CoT", an upper bound."""

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
    """What its folder's name shares with those of the runs that differ from it by seed only; equal for all of these."""
    seed: int
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    groups: list[dict[str, Any]]
    """Rows of groups.jsonl: step, phase, and per answer `rewards` by name, `advantages`, `is_off_policy`."""
    answers: dict[str, list[dict[str, Any]]]
    """The last evaluation's answers by mode."""
    summary: dict[str, Any] = field(default_factory=dict)
    """summary.json, which a run writes when it ends."""

    @property
    def label(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def task(self) -> Task:
        return self.config["data"]["task"]


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % confidence interval; nan where a single value tells nothing of it."""

    mean: float
    half_width: float

    def percent(self) -> str:
        """In per cent, as scores are shown."""
        mean, half_width = 100 * self.mean, 100 * self.half_width
        return f"{mean:.1f}" if math.isnan(half_width) else f"{mean:.1f} ± {half_width:.1f}"


@dataclass(frozen=True)
class ScoreRow:
    """The scores of one method in one mode."""

    method: str
    mode: str
    seeds: tuple[int, ...]
    scores: dict[str, Interval]
    """By metric of the task. Over the seeds; over the queries when there is one seed and the task is grounding."""
    gain: Interval | None
    """The first of the scores minus that of the first method, paired by seed, or by query where they share one seed;
    None without common seeds."""


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in `folders`. Raises ValueError naming a folder that holds none, or folders of different tasks."""
    configs = []
    for folder in folders:
        for name in ("config.json", "metrics.jsonl"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: not a run folder, it has no {name}")
        configs.append(read_json(folder / "config.json"))
    try:
        tasks = [config["data"]["task"] for config in configs]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folders[len(configs) - 1]}: its config.json is no record of a run: {error!r}") from error
    if len(set(tasks)) > 1:
        found = ", ".join(f"{folder} {task}" for folder, task in zip(folders, tasks, strict=True))
        raise ValueError(f"runs of different tasks cannot be compared: {found}")
    return [
        RunRecord(
            folder=folder,
            method=method,
            seed=config["train"]["seed"],
            config=config,
            metrics=read_rows(folder / "metrics.jsonl"),
            groups=read_rows(folder / "groups.jsonl"),
            answers={mode: read_rows(files[-1]) for mode in get_args(Mode) if (files := eval_files(folder, mode))},
            summary=read_json(path) if (path := folder / "summary.json").is_file() else {},
        )
        for folder, config, method in zip(folders, configs, name_methods(configs, folders), strict=True)
    ]


def name_methods(configs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> list[str]:
    """A name for the method of each run: its folder's, or what the names of all runs of the method share.

    Where that does not tell two methods apart, the settings in which they differ.
    """
    settings = differing_settings(configs)
    names = {
        each: _shared_name([folder.name for folder, other in zip(folders, settings, strict=True) if other == each])
        for each in settings
    }
    if len(set(names.values())) < len(names) or not all(re.search(r"[^\W\d_]", name) for name in names.values()):
        return [each or folders[0].name for each in settings]
    return [names[each] for each in settings]


def differing_settings(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Of each configuration the settings in which some differ, but for what tells runs of one method apart."""
    settings = [
        {name: value for section in config.values() for name, value in section.items() if name not in NOT_A_METHOD}
        for config in configs
    ]
    differing = [name for name in settings[0] if any(each.get(name) != settings[0][name] for each in settings)]
    return [", ".join(f"{name}={each.get(name)}" for name in differing) for each in settings]


def _shared_name(names: Sequence[str]) -> str:
    """`grpo-*` of grpo-0 and grpo-1."""
    if len(set(names)) == 1:
        return names[0]
    start = _common_start(names)
    end = _common_start([name[len(start) :][::-1] for name in names])[::-1]
    return f"{start}*{end}"


def _common_start(names: Sequence[str]) -> str:
    columns = zip(*names, strict=False)
    return "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, columns))


def own_rewards(run: RunRecord) -> str | None:
    """The setting `rewards` of a run."""
    return run.config["algorithm"].get("rewards")


def by_method(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each method, in the order in which the methods first occur."""
    methods: dict[str, list[RunRecord]] = {}
    for run in runs:
        methods.setdefault(run.method, []).append(run)
    return methods


def step_medians(run: RunRecord, prefixes: tuple[str, ...], phase: str) -> dict[str, float]:
    """Of every metric with one of the prefixes, the median over the steps of one phase."""
    values: dict[str, list[float]] = {}
    for row in run.metrics:
        for name, value in row.items():
            if row["phase"] == phase and name.startswith(prefixes):
                values.setdefault(name, []).append(value)
    return {name: float(np.median(each)) for name, each in values.items()}


def interval(values: Sequence[float]) -> Interval:
    """Mean of independent values and the half-width of its 95 % interval (Student's t); nan for a single value."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan)
    quantile = STUDENT_T_975[count - 2] if count - 2 < len(STUDENT_T_975) else NORMAL_975
    return Interval(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count))


def score_table(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """A row per mode and method, the methods of a mode together; the runs are of one task.

    For grounding from the answers themselves, for other tasks as the run logged its last evaluation: without the oracle
    and, for one seed, without an interval.
    """
    rows = []
    for mode in (*get_args(Mode), ORACLE):
        baseline: dict[int, RunRecord] = {}
        for method, members in by_method(runs).items():
            by_seed = {run.seed: run for run in members if _scores(run, mode)}
            if not by_seed:
                continue
            scores = {seed: _scores(run, mode) for seed, run in by_seed.items()}
            only = next(iter(by_seed.values()))
            pairs = [(by_seed[seed], baseline[seed]) for seed in by_seed if seed in baseline]
            baseline = baseline or by_seed
            rows.append(
                ScoreRow(
                    method=method,
                    mode=mode,
                    seeds=tuple(by_seed),
                    scores=_over_seeds(list(scores.values())) if len(scores) > 1 else _of_one(only, mode),
                    gain=_gain(pairs, mode) if pairs else None,
                )
            )
    return rows


def constant_rows(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Of the runs' summaries, the scores of a model that never looks, each once; `stage` names its span."""
    rows = [row for run in runs for row in run.summary.get("rows", ()) if row["mode"] == "-"]
    return [row for index, row in enumerate(rows) if row not in rows[:index]]


def _gain(pairs: Sequence[tuple[RunRecord, RunRecord]], mode: str) -> Interval:
    """Of the first score, over pairs of runs, or of one pair over the queries that both answered."""
    if len(pairs) == 1 and pairs[0][0].task == "grounding":
        ours, theirs = (dict(zip(_ids(run, mode), _ious(run, mode), strict=True)) for run in pairs[0])
        return interval([(ours[each] or 0.0) - (theirs[each] or 0.0) for each in ours if each in theirs] or [math.nan])
    firsts = [[next(iter(_scores(run, mode).values())) for run in pair] for pair in pairs]
    return interval([ours - theirs for ours, theirs in firsts])


def _ids(run: RunRecord, mode: str) -> list[str]:
    return [row["sample_id"] for row in run.answers[get_args(Mode)[0] if mode == ORACLE else mode]]


def _scores(run: RunRecord, mode: str) -> dict[str, float]:
    """The task's scores after the last phase; empty where the run has none in this mode."""
    if run.task == "grounding":
        ious = _ious(run, mode)
        return grounding_scores(ious) if ious else {}
    prefix = f"eval/{mode}/"
    evaluations = [row for row in run.metrics if any(name.startswith(prefix) for name in row)]
    last = evaluations[-1] if evaluations else {}
    return {name.removeprefix(prefix): value for name, value in last.items() if name.startswith(prefix)}


def _over_seeds(scores: Sequence[dict[str, float]]) -> dict[str, Interval]:
    return {name: interval([score[name] for score in scores]) for name in scores[0]}


def _of_one(run: RunRecord, mode: str) -> dict[str, Interval]:
    return over_queries(_ious(run, mode)) if run.task == "grounding" else _over_seeds([_scores(run, mode)])


def over_queries(ious: Sequence[float | None]) -> dict[str, Interval]:
    """`grounding_scores` of one run, its intervals over the queries."""
    per_query = [grounding_scores([iou]) for iou in ious]
    return {name: interval([scores[name] for scores in per_query]) for name in per_query[0]}


def _ious(run: RunRecord, mode: str) -> list[float | None]:
    """One per held-out query, None where the answer did not parse; empty where the run has no such answers."""
    if mode == ORACLE:
        by_mode = [_ious(run, each) for each in get_args(Mode)]
        return oracle_ious(by_mode) if all(by_mode) else []
    return answered_ious(run.answers.get(mode, []))

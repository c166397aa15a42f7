"""From a run's folder to the figures that the campaign keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from tempsamp_fast.evaluation.scoring import answered_ious, grounding_scores, oracle_ious
from tempsamp_fast.report.figures import select, skewness, task_rewards
from tempsamp_fast.report.plots import eval_files, read_rows
from tempsamp_fast.sample import Mode

HIT_IOU = 0.5
NUM_PARTS = 10
"""Stretches of training that the statistics of groups have a value for."""
NUM_BINS = 40
ADVANTAGE_LIMITS = (-4.0, 4.0)


def record_of(folder: Path) -> dict[str, Any]:
    """Scores of every evaluation by mode, and what the rewards and advantages of a reinforcement run were like."""
    metrics = read_rows(folder / "metrics.jsonl")
    groups = read_rows(folder / "groups.jsonl")
    record: dict[str, Any] = {"evaluations": _evaluations(metrics)}
    answers = {mode: read_rows(files[-1]) for mode in get_args(Mode) if (files := eval_files(folder, mode))}
    if len(answers) > 1:
        record["oracle_of_both"] = grounding_scores(oracle_ious([answered_ious(rows) for rows in answers.values()]))
    if groups:
        record |= {"rewards": _rewards(groups), "advantages": _advantages(groups)}
        record["format_reward"] = _parts(
            [(row["step"], row["reward/format"]) for row in metrics if "reward/format" in row]
        )
        record["skewness_by_rule"] = _mean_skewness(metrics)
        for name in ("reward/tied_groups", "prune/flops_saved", "batch/tree_saving"):
            if values := [row[name] for row in metrics if name in row]:
                record[name.partition("/")[2]] = float(np.mean(values))
    return record


def _evaluations(metrics: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """By mode, in order: the number of steps done and the scores then."""
    found: dict[str, list[dict[str, float]]] = {}
    for row in metrics:
        for mode in get_args(Mode):
            prefix = f"eval/{mode}/"
            scores = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
            if scores:
                found.setdefault(mode, []).append({"step": row["step"], **scores})
    return found


def _rewards(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the sampled answers: how often they hit, and the best one of each group over training (paper figure 3)."""
    sampled = [task_rewards(group) for group in groups]
    first = [reward for rewards in sampled[: len(sampled) // 4] for reward in rewards]
    last = [reward for rewards in sampled[-(len(sampled) // 4) :] for reward in rewards]
    best = [(group["step"], max(rewards)) for group, rewards in zip(groups, sampled, strict=True)]
    return {
        "mean": {"first_quarter": float(np.mean(first)), "last_quarter": float(np.mean(last))},
        "hits": {"first_quarter": _share_of_hits(first), "last_quarter": _share_of_hits(last)},
        "groups_without_a_hit": float(np.mean([max(rewards) < HIT_IOU for rewards in sampled])),
        "groups_without_any_reward": float(np.mean([max(rewards) == 0 for rewards in sampled])),
        "best_of_group": _parts(best),
    }


def _share_of_hits(rewards: Sequence[float]) -> float:
    return float(np.mean([reward >= HIT_IOU for reward in rewards]))


def _parts(points: Sequence[tuple[int, float]]) -> dict[str, list[float]]:
    """Mean, median and quartiles of values in `NUM_PARTS` stretches of training; `points` are (step, value)."""
    if not points:
        return {}
    parts = [part[:, 1] for part in np.array_split(np.array(sorted(points)), min(NUM_PARTS, len(points)))]
    low, median, high = np.array([np.percentile(part, (25, 50, 75)) for part in parts]).T
    means = [float(part.mean()) for part in parts]
    return {"mean": means, "low": low.tolist(), "median": median.tolist(), "high": high.tolist()}


def _advantages(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As the updates used them: skewness over all answers, and histograms of both sources (paper figure 4)."""
    every = [value for group in groups for value in group["advantages"]]
    by_source = {
        source: [value for group in groups for value in select(group, group["advantages"], is_off_policy)]
        for source, is_off_policy in (("on_policy", False), ("off_policy", True))
    }
    return {
        "skewness": skewness(every),
        "mean": {source: float(np.mean(values)) for source, values in by_source.items() if values},
        "histogram": {source: _histogram(values) for source, values in by_source.items() if values},
        "limits": ADVANTAGE_LIMITS,
    }


def _histogram(values: Sequence[float]) -> list[int]:
    """Counts in `NUM_BINS` bins over `ADVANTAGE_LIMITS`; values beyond them in the outermost bins."""
    counts, _ = np.histogram(np.clip(values, *ADVANTAGE_LIMITS), bins=NUM_BINS, range=ADVANTAGE_LIMITS)
    return counts.tolist()


def _mean_skewness(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What each rule would have made of this run's rewards, per step, then the mean over the steps."""
    prefix = "advantage/skew/"
    rows = [row for row in metrics if any(name.startswith(prefix) for name in row)]
    names = [name for name in rows[0] if name.startswith(prefix)] if rows else []
    return {name.removeprefix(prefix): float(np.mean([row[name] for row in rows])) for name in names}

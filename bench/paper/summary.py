"""What the results say, in Markdown: tables, and for each ordering of the paper whether it holds here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from bench.paper import plan
from bench.paper.results import Results
from tempsamp_fast.report.runs import Interval, interval

Record = dict[str, Any]
Score = Callable[[Record], float]

PAPER_ORDER = ("nonlinear", "anchor", "downscale", "grpo", "mixed")
"""Best first, by the paper's ablation of the advantage rule."""
OTHER_PAIRS = (("nonlinear", "grpo"), ("nonlinear", "mixed"), ("nonlinear", "sft"), ("orarl", "nonlinear"))
TABLED = ("miou", "r1@0.3", "r1@0.5", "r1@0.7")
COMPARED = ("miou", "r1@0.7")
FORMATS = {"cpu_s": "{:.1f}", "tree_saving": "{:.2f}"}
"""Of means over seeds; all others are shares, told in per cent."""


def summarise(results: Results) -> str:
    """All tables and verdicts, each from the runs that are in."""
    sections = [
        _header(results),
        _methods(results),
        _orderings(results),
        _beyond(results),
        _group_sizes(results),
        _few_shot(results),
        _hybrid(results),
        _distributions(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def final(record: Record, metric: str, mode: str = "answer") -> float:
    """A score of the last evaluation."""
    return record["evaluations"][mode][-1][metric]


def records(results: Results, family: str, method: str, **fields: Any) -> dict[int, Record]:
    """The runs of a method by seed."""
    wanted = {"family": family, "method": method, **fields}
    found = [r for r in results["runs"].values() if all(r[name] == value for name, value in wanted.items())]
    return {record["seed"]: record for record in sorted(found, key=lambda record: record["seed"])}


def of_group_size(results: Results, method: str, size: int) -> dict[int, Record]:
    """The runs with `size` answers per prompt; those with the core runs' number are the core runs."""
    if size == plan.CORE_GROUP_SIZE:
        core = records(results, "core", method)
        return {seed: record for seed, record in core.items() if seed in plan.EXPLORATORY_SEEDS}
    return records(results, "group size", method, num_generations=size)


def paired(first: dict[int, Record], second: dict[int, Record], score: Score) -> Interval | None:
    """Mean of first minus second over their common seeds, with its 95 % interval; None with fewer than two seeds."""
    differences = [score(first[seed]) - score(second[seed]) for seed in first if seed in second]
    return interval(differences) if len(differences) > 1 else None


def verdict(difference: Interval | None) -> str:
    """What the interval says of "first is better than second"."""
    if difference is None:
        return "too few runs"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return "holds" if low > 0 else "reversed" if high < 0 else "open: the interval spans 0"


def steps_to_reach(record: Record, target: float) -> float | None:
    """Training steps until the held-out mIoU is `target`, on straight lines between evaluations; None if never."""
    evaluations = record["evaluations"]["answer"]
    before = evaluations[0]
    if before["miou"] >= target:
        return 0.0
    for after in evaluations[1:]:
        if after["miou"] >= target:
            share = (target - before["miou"]) / (after["miou"] - before["miou"])
            return before["step"] + share * (after["step"] - before["step"])
        before = after
    return None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: Interval | None) -> str:
    """In per cent, e.g. `39.6 ± 1.1`."""
    return "-" if value is None else value.percent()


def points(value: Interval | None) -> str:
    """A difference in points, e.g. `+3.1 ± 0.8`."""
    return "-" if value is None else f"{100 * value.mean:+.1f} ± {100 * value.half_width:.1f}"


def _means(found: dict[int, Record], metric: str, mode: str = "answer") -> str:
    values = [final(record, metric, mode) for record in found.values()]
    return percent(interval(values) if values else None)


def _header(results: Results) -> str:
    done, planned = results.get("done", 0), results["planned"]
    constant = results["constant_span"]
    cold = [scores for name, scores in results["cold_starts"].items() if name.isdecimal()]
    start, end = constant["span"]
    grpo = records(results, "core", "grpo").values()
    commits = ", ".join(sorted({record["commit"][:8] for record in results["runs"].values()}))
    lines = [
        "# The paper's claims in the small",
        f"{'**Partial: ' if done < planned else ''}{done} of {planned} planned runs are in"
        f"{'.**' if done < planned else '.'} Made by `python bench/paper_in_small.py` at {commits}.",
        f"{results['num_queries']} held-out queries. Always answering {start:.1f} to {end:.1f} s, the best constant "
        f"span, has an mIoU of {100 * constant['miou']:.1f} and an R1@0.7 of {100 * constant['r1@0.7']:.1f}.",
    ]
    if cold:
        lines.append(
            f"The cold starts ({len(cold)} seeds) have an mIoU of {100 * statistics.mean(c['miou'] for c in cold):.1f} "
            f"and an R1@0.7 of {100 * statistics.mean(c['r1@0.7'] for c in cold):.1f}."
        )
    if "rate" in results:
        why = "given" if results.get("given_rate") else f"the best of {plan.PILOT_RATES} in the pilots"
        lines.append(f"Learning rate of all methods: {results['rate']:g}, {why}.")
    if grpo:
        hits = statistics.mean(record["rewards"]["hits"]["first_quarter"] for record in grpo)
        without = statistics.mean(record["rewards"]["groups_without_any_reward"] for record in grpo)
        lines.append(
            f"Under GRPO {100 * hits:.1f} % of the answers sampled in the first quarter of training reach an IoU of "
            f"0.5; {100 * without:.1f} % of all its groups earn nothing at all."
        )
    lines.append(
        "± is the half-width of a 95 % interval over seeds (Student's t, not corrected for the number of comparisons); "
        "differences are paired by seed: same cold start, same order of the data, same noise of the sampler."
    )
    return "\n\n".join(lines)


def _methods(results: Results) -> str:
    grpo = records(results, "core", "grpo")
    target = statistics.mean(final(record, "miou") for record in grpo.values()) if grpo else None
    rows = []
    for method in plan.METHODS:
        found = records(results, "core", method)
        if found:
            rows.append([method, str(len(found)), *(_means(found, metric) for metric in TABLED), _steps(found, target)])
    if not rows:
        return ""
    reached = "-" if target is None else f"steps to mIoU {100 * target:.1f}"
    text = table(["method", "seeds", *map(_title, TABLED), reached], rows)
    return (
        "## Methods\n\nAfter the same number of steps on the same prompts, 4 answers each (SFT: the true one), in per "
        f"cent. The mIoU to reach is the mean that GRPO ends with; median over the seeds that get there.\n\n{text}"
    )


def _steps(found: dict[int, Record], target: float | None) -> str:
    if target is None:
        return "-"
    reached = [steps for record in found.values() if (steps := steps_to_reach(record, target)) is not None]
    return f"{statistics.median(reached):.0f} ({len(reached)} of {len(found)})" if reached else f"0 of {len(found)}"


def _title(metric: str) -> str:
    return "mIoU" if metric == "miou" else metric.upper()


def _comparison(label: str, first: dict[int, Record], second: dict[int, Record]) -> list[str]:
    """A row: the difference in every compared metric and the verdict by the first of them."""
    differences = [paired(first, second, lambda record, m=metric: final(record, m)) for metric in COMPARED]
    seeds = str(len(first.keys() & second.keys()))
    return [label, seeds, *map(points, differences), verdict(differences[0])]


def _orderings(results: Results) -> str:
    of = {method: records(results, "core", method) for method in plan.METHODS}
    header = ["first > second", "seeds", *(f"{_title(metric)}, points" for metric in COMPARED), "by mIoU"]
    chain = [_comparison(f"{a} > {b}", of[a], of[b]) for a, b in pairwise(PAPER_ORDER)]
    others = [_comparison(f"{a} > {b}", of[a], of[b]) for a, b in OTHER_PAIRS]
    by_verdict = [f"{row[0]}: {row[-1]}" for row in chain]
    return (
        f"## The paper's ordering: {' > '.join(PAPER_ORDER)}\n\n{table(header, chain)}\n\n"
        f"Step by step: {'; '.join(by_verdict)}.\n\n### Further pairs\n\n{table(header, others)}"
    )


def _beyond(results: Results) -> str:
    """Pruning on and off, the Wasserstein reward against the IoU, a video's queries together: each pair with its price
    or its ties.
    """
    pruning = {method: records(results, "pruning", method) for method in plan.PRUNING}
    iou, wasserstein = records(results, "core", "grpo"), records(results, "reward", plan.WASSERSTEIN)
    pairs = []
    if all(pruning.values()):
        pairs.append(([*pruning], [*pruning.values()]))
    if wasserstein:
        pairs.append((["grpo, IoU", plan.WASSERSTEIN], [iou, wasserstein]))
    trees = {method: records(results, "tree", method) for method in plan.QUERIES_PER_VIDEO}
    if all(trees.values()):
        pairs.append(([*trees], [*trees.values()]))
    rows = []
    for names, (before, after) in pairs:
        for name, found in zip(names, (before, after), strict=True):
            shares = [_mean_of(found, key) for key in ("tied_groups", "flops_saved", "tree_saving", "cpu_s")]
            compared = _comparison("", after, before)[2:] if found is after else ["", "", ""]
            rows.append([name, str(len(found)), *(_means(found, metric) for metric in COMPARED), *shares, *compared])
    if not rows:
        return ""
    header = ["run", "seeds", *map(_title, COMPARED), "groups that teach nothing, %", "FLOPs of the update saved, %"]
    header += ["tokens of rows over those of trees", "CPU s"]
    header += [*(f"{_title(metric)} over the row above, points" for metric in COMPARED), "better by mIoU"]
    return (
        "## Beyond the paper: pruning, a reward for answers that miss, a video's queries in one step\n\n"
        f"{table(header, rows)}"
    )


def _mean_of(found: dict[int, Record], key: str) -> str:
    """Over the seeds that have it: seconds, a factor, or a share in per cent.

    Records of before ties were kept say how many groups had no reward at all, which with an IoU is about the same.
    """
    before = lambda record: record["rewards"]["groups_without_any_reward"] if key == "tied_groups" else None
    values = [value for record in found.values() if (value := record.get(key, before(record))) is not None]
    return "-" if not values else FORMATS.get(key, "{:.1%}").format(statistics.mean(values)).rstrip("%")


def _group_sizes(results: Results) -> str:
    rows = []
    for size in plan.GROUP_SIZES:
        ours, grpo = of_group_size(results, "nonlinear", size), of_group_size(results, "grpo", size)
        if ours or grpo:
            scores = [_means(grpo, "miou"), _means(ours, "miou"), _means(grpo, "r1@0.7"), _means(ours, "r1@0.7")]
            rows.append([str(size), *scores, *_comparison("", ours, grpo)[1:]])
    if not rows:
        return ""
    header = ["answers", "GRPO mIoU", "TempSamp-R1 mIoU", "GRPO R1@0.7", "TempSamp-R1 R1@0.7"]
    header += ["seeds", "mIoU, points", "R1@0.7, points", "TempSamp-R1 > GRPO by mIoU"]
    return f"## Answers per prompt (exploratory)\n\n{table(header, rows)}"


def _few_shot(results: Results) -> str:
    rows = []
    for num_videos in plan.FEW_SHOT_VIDEOS:
        of = {m: records(results, "few shot", m, num_videos=num_videos) for m in ("sft", "grpo", "nonlinear")}
        if any(of.values()):
            scores = [_means(found, "miou") for found in of.values()]
            over_sft, over_grpo = (_comparison("", of["nonlinear"], of[other]) for other in ("sft", "grpo"))
            rows.append([str(num_videos), *scores, over_sft[1], over_sft[2], over_sft[-1], over_grpo[2], over_grpo[-1]])
    if not rows:
        return ""
    header = ["videos", "SFT mIoU", "GRPO mIoU", "TempSamp-R1 mIoU", "seeds"]
    header += ["over SFT, points", "TempSamp-R1 > SFT", "over GRPO, points", "TempSamp-R1 > GRPO"]
    return f"## Few-shot, {plan.FEW_SHOT_EPOCHS} epochs (exploratory)\n\n{table(header, rows)}"


def _hybrid(results: Results) -> str:
    rows = []
    for scheme in plan.SCHEMES:
        found = records(results, "hybrid", scheme)
        for mode in ("answer", "think") if found else ():
            scores = [_means(found, metric, mode) for metric in (*TABLED, "parse_rate")]
            rows.append([scheme, mode, str(len(found)), *scores, _format(found) if mode == "think" else "-"])
        if found:
            oracle = [interval([record["oracle_of_both"][m] for record in found.values()]) for m in TABLED]
            scores = [percent(score) if len(found) > 1 else f"{100 * score.mean:.1f}" for score in oracle]
            rows.append([scheme, "better of both (oracle)", str(len(found)), *scores, "-", "-"])
    if not rows:
        return ""
    header = ["trained", "asked", "seeds", *map(_title, TABLED), "parsed", "format reward, first to last of training"]
    return (
        "## Hybrid chain of thought (exploratory)\n\nTempSamp-R1, nonlinear, from the same cold starts, which saw "
        "think prompts in the base model only. The oracle takes the better of both answers by looking at the truth: an "
        "upper bound, not a result.\n\n" + table(header, rows)
    )


def _format(found: dict[int, Record]) -> str:
    curves = [record["format_reward"]["mean"] for record in found.values() if record["format_reward"]]
    if not curves:
        return "no think prompts"
    return f"{statistics.mean(c[0] for c in curves):.2f} to {statistics.mean(c[-1] for c in curves):.2f}"


def _distributions(results: Results) -> str:
    rows = []
    for method in plan.METHODS:
        found = [record for record in records(results, "core", method).values() if "advantages" in record]
        if not found:
            continue
        best = [record["rewards"]["best_of_group"] for record in found]
        spread = [b["high"][-1] - b["low"][-1] for b in best]
        figures = [
            [record["advantages"]["skewness"] for record in found],
            [record["advantages"]["mean"].get("off_policy", float("nan")) for record in found],
            [b["median"][0] for b in best],
            [b["median"][-1] for b in best],
            spread,
        ]
        rows.append([method, str(len(found)), *(f"{statistics.mean(values):.2f}" for values in figures)])
    if not rows:
        return ""
    header = ["method", "seeds", "skewness of advantages", "mean advantage of the true answer"]
    header += ["best reward of a group, median, first part", "last part", "its quartiles' distance, last part"]
    return f"## Advantages and rewards\n\nMeans over seeds; a part is a tenth of training.\n\n{table(header, rows)}"

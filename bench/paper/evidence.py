"""What the runs say of "reinforcement generalises, supervised training does not", in Markdown."""

from __future__ import annotations

import statistics

from bench.paper import plan
from bench.paper.results import Results
from bench.paper.summary import Record, Score, final, paired, percent, points, records, table, verdict
from tempsamp_fast.report.runs import interval

METHODS = ("sft", "grpo", "nonlinear")


def evidence(results: Results) -> list[str]:
    """A section for each family that has runs."""
    return [_elsewhere(results), _noise(results), _rare_hits(results)]


def _scores(found: dict[int, Record], score: Score) -> str:
    values = [score(record) for record in found.values()]
    return percent(interval(values)) if len(values) > 1 else "-"


def _over(label: str, first: dict[int, Record], second: dict[int, Record], score: Score) -> list[str]:
    difference = paired(first, second, score)
    return [label, str(len(first.keys() & second.keys())), points(difference), verdict(difference)]


def _of(test: str, metric: str) -> Score:
    return lambda record: record["tests"][test][metric]


def _elsewhere(results: Results) -> str:
    """Out of domain, and what was forgotten: the easy stage, the other mode."""
    of = {method: records(results, "elsewhere", method) for method in (plan.START, *METHODS)}
    if not any(of.values()):
        return ""
    columns: list[tuple[str, Score]] = [
        ("out of domain: mIoU", _of("far", "miou")),
        ("R1@0.5", _of("far", "r1@0.5")),
        ("easy videos: mIoU", _of("easy", "miou")),
        ("asked to think: mIoU", _of("thinking", "miou")),
        ("parsed", _of("thinking", "parse_rate")),
    ]
    rows = [[method, str(len(found)), *(_scores(found, score) for _, score in columns)] for method, found in of.items()]
    pairs = [("grpo", "sft"), ("nonlinear", "sft"), ("nonlinear", "grpo")]
    over = [_over(f"{a} > {b}", of[a], of[b], _of("far", "miou")) for a, b in pairs]
    kept = [
        _over(f"{method} keeps {label}", of[method], of[plan.START], score)
        for method in METHODS
        for label, score in (("easy videos", columns[2][1]), ("thinking", columns[3][1]))
    ]
    head = ["first > second", "seeds", "mIoU, points", "by mIoU"]
    return (
        f"## Out of domain, and forgetting\n\nTrained to answer on circles in 10 s; tested on "
        f"{' and '.join(plan.FAR.shapes)}s in {plan.FAR.min_duration_s:g} to {plan.FAR.max_duration_s:g} s, on the "
        f"easy stage, and asked to think, which no run trained.\n\n"
        f"{table(['method', 'seeds', *(title for title, _ in columns)], rows)}\n\n### Out of domain\n\n"
        f"{table(head, over)}\n\n### Over the start\n\n{table(['run', *head[1:]], kept)}"
    )


def _noise(results: Results) -> str:
    score: Score = lambda record: final(record, "miou")
    rows = []
    for noise in (0.0, *plan.NOISE):
        of = {m: records(results, "noise", m, noise=noise) if noise else records(results, "core", m) for m in METHODS}
        gains = [_over("", of[method], of["sft"], score)[2:] for method in METHODS[1:]]
        rows.append([f"{100 * noise:.0f}", *(_scores(found, score) for found in of.values()), *gains[0], *gains[1]])
    if not any(records(results, "noise", method) for method in METHODS):
        return ""
    header = ["errors, % of a span's length", "SFT mIoU", "GRPO mIoU", "TempSamp-R1 mIoU"]
    header += ["GRPO over SFT, points", "GRPO > SFT", "TempSamp-R1 over SFT, points", "TempSamp-R1 > SFT"]
    return f"## Wrong truths\n\nStarts and ends of the training spans with normal errors.\n\n{table(header, rows)}"


def _rare_hits(results: Results) -> str:
    of = {method: records(results, "rare hits", method) for method in ("sft", "grpo", "mixed", "nonlinear")}
    rewarded = [record["rewards"]["hits"]["first_quarter"] for record in of["grpo"].values()]
    if not rewarded:
        return ""
    score: Score = lambda record: final(record, "miou")
    rows = [
        [method, str(len(found)), _scores(found, score), *_over("", found, of["grpo"], score)[2:]]
        for method, found in of.items()
    ]
    return (
        f"## Rarer hits\n\nFrom starts of fewer steps: {100 * statistics.mean(rewarded):.1f} % of the answers that GRPO"
        " samples in the first quarter reach an IoU of 0.5.\n\n"
        f"{table(['method', 'seeds', 'mIoU', 'over GRPO, points', 'better than GRPO'], rows)}"
    )

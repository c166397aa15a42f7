"""The page: its sections put together, with nothing loaded from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tempsamp_fast.report import figures
from tempsamp_fast.report.curves import charts
from tempsamp_fast.report.gallery import gallery
from tempsamp_fast.report.runs import (
    RunRecord,
    ScoreRow,
    by_method,
    constant_rows,
    differing_settings,
    score_table,
    step_medians,
)

HERE = Path(__file__).parent


def build_page(runs: Sequence[RunRecord], num_gallery: int) -> str:
    """The HTML of the report on `runs`; parts that the runs left no record for are left out."""
    pictures = [
        (figures.best_reward(runs), "Best sampled reward of each group: median, quartiles shaded."),
        (figures.reward_distribution(runs), "Sampled rewards early and late in reinforcement learning."),
        (figures.advantage_distribution(runs), "Advantages as the updates used them."),
        (figures.rule_comparison(runs), "What every rule would have made of the rewards of one of the runs."),
    ]
    colours = figures.method_colours(runs)
    samples, answers = _answers(runs)
    data = {
        "methods": [{"label": method, "colour": colour} for method, colour in colours.items()],
        "charts": charts(runs),
        "samples": samples,
        "answers": answers,
    }
    sections = [
        ("Runs", _run_list(runs)),
        ("Scores", _score_table(score_table(runs), runs, answers)),
        ("Answers", samples and '<div id="answers"></div>' + _hint("Choose a figure of the table of scores.")),
        ("Gallery", _gallery(runs, num_gallery)),
        ("Speed", _speed_table(runs)),
        ("Curves", data["charts"] and CURVES),
        ("Distributions", "".join(_figure(svg, caption) for svg, caption in pictures if svg)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Training report</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body><h1>Training report</h1>{body}"
        f'<script type="application/json" id="data">{text}</script><script>{script}</script></body></html>\n'
    )


CURVES = (
    '<p class="hint">One line per run. Point at a curve for its values, drag over steps to look closer, double-click '
    'to go back.</p><div id="legend"></div><div id="charts"></div>'
    "<noscript>Curves, answers and playing need JavaScript; nothing is loaded from elsewhere.</noscript>"
)


def _answers(runs: Sequence[RunRecord]) -> tuple[list[Any], dict[str, list[dict[str, Any]]]]:
    """What was asked (query, file, true spans), and by mode each run's answers to it (start, end, IoU)."""
    if runs[0].task == "highlight":
        return [], {}
    rows = {row["sample_id"]: row for run in runs for answers in run.answers.values() for row in answers}
    samples = [[row["query"], Path(row["video"]).name, row["windows"]] for row in rows.values()]
    methods = list(by_method(runs))
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for mode, answers in run.answers.items():
            found = {row["sample_id"]: [*(row["span"] or (None, None)), row["iou"]] for row in answers}
            listed = [found.get(sample_id) for sample_id in rows]
            entry = {"method": methods.index(run.method), "run": run.folder.name, "rows": listed}
            by_mode.setdefault(mode, []).append(entry)
    return samples, by_mode


def _run_list(runs: Sequence[RunRecord]) -> str:
    differing = differing_settings([run.config for run in runs])
    rows = [
        [run.folder.name, run.method, str(run.seed), run.config["model"]["model"], run.config["train"]["phases"]]
        for run in runs
    ]
    header = ["folder", "method", "seed", "model", "phases"]
    if len(runs) > 1:
        header, rows = [*header, "differs in"], [[*row, each] for row, each in zip(rows, differing, strict=True)]
    return _table(header, rows)


def _score_table(rows: Sequence[ScoreRow], runs: Sequence[RunRecord], answers: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    names = list(rows[0].scores)
    methods = list(by_method(runs))
    over = [f"{names[0]} over {rows[0].method}, points"] if len(methods) > 1 else []
    header = ["method", "mode", *over, *names, "seeds"]
    cells = []
    for row in rows:
        target = f"#answers-{row.mode}-{methods.index(row.method)}" if row.mode in answers else ""
        linked = [_linked(target, row.scores[name].percent()) for name in names]
        gain = [escape(row.gain.percent() if row.gain else "-") for _ in over]
        cells.append([escape(row.method), escape(row.mode), *gain, *linked, str(len(row.seeds))])
    constants = constant_rows(runs)
    for scores in constants:
        known = [f"{100 * scores[name]:.1f}" if name in scores else "-" for name in names]
        cells.append([escape(scores["stage"]), "-", *("-" for _ in over), *known, "-"])
    counts = sorted({len(each) for run in runs for each in run.answers.values()})
    hint = f"{' or '.join(map(str, counts))} held-out queries. " if counts else ""
    hint += "In per cent, after the last phase: mean ± 95 % interval over the seeds (Student’s t), "
    if runs[0].task == "grounding":
        hint += (
            "or over the queries where there is one seed. “Oracle of both” takes the better mode of each query by "
            "looking at the truth: an upper bound, not a result. "
        )
    else:
        hint += "as the runs logged their last evaluation. "
    if over:
        hint += "Gains are paired by seed, or by query where there is one seed. "
    if constants:
        hint += "“Constant” always answers the span that fits the training queries best. "
    hint += "Figures lead to their answers."
    return _raw_table(header, cells) + _hint(hint)


def _linked(target: str, text: str) -> str:
    return f'<a href="{target}">{escape(text)}</a>' if target else escape(text)


def _gallery(runs: Sequence[RunRecord], num_shown: int) -> str:
    if runs[0].task == "highlight":
        return _hint("Left out: the answers of highlight detection rate clips and have no span to draw.")
    shown = gallery(runs, figures.method_colours(runs), num_shown)
    return shown and _hint("Held-out queries at equal distances from the first run’s worst answer to its best.") + shown


def _speed_table(runs: Sequence[RunRecord]) -> str:
    """Medians over the steps of each phase of each run."""
    medians = [
        (run.folder.name, phase, step_medians(run, ("time/", "perf/", "batch/tree_saving"), phase))
        for run in runs
        for phase in dict.fromkeys(row["phase"] for row in run.metrics if "time/step_s" in row)
    ]
    if not medians:
        return ""
    names = sorted({name for *_, row in medians for name in row}, reverse=True)
    cells = [
        [folder, phase, *(f"{row[name]:,.{0 if row[name] >= 100 else 3}f}" if name in row else "-" for name in names)]
        for folder, phase, row in medians
    ]
    header = ["folder", "phase", *(name.partition("/")[2] for name in names)]
    return _table(header, cells) + _hint(
        "Medians over steps: seconds of the step and its parts, tokens per second, MFU, and tree_saving, how many "
        "times fewer tokens trees have than rows of one question each."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return _raw_table(header, [[escape(cell) for cell in row] for row in rows])


def _raw_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of cells that are HTML."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def _figure(svg: str, caption: str) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'

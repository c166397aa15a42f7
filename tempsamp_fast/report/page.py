"""The page: its sections put together, with nothing loaded from anywhere else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from tempsamp_fast.report import figures
from tempsamp_fast.report.gallery import gallery
from tempsamp_fast.report.runs import RunRecord, ScoreRow, score_table, step_medians
from tempsamp_fast.sample import Task

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2126; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 0; }
table { border-collapse: collapse; font-size: .9rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .55rem; border-bottom: 1px solid #d5d9de; vertical-align: bottom; }
table.numbers td { white-space: nowrap; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figure img { width: 100%; } figcaption, .hint, .file { color: #5a6570; font-size: .85rem; }
article { margin: 1.5rem 0 2.5rem; } .file { margin: 0 0 .4rem; }
.strip, .bar { display: grid; grid-template-columns: 11rem minmax(0, 1fr) 13rem; gap: .6rem; align-items: center; }
.strip { margin-bottom: .3rem; } .frames { display: flex; } .frames img { flex: 1; min-width: 0; }
.track { position: relative; height: .8rem; background: #eceff2; }
.track i { position: absolute; top: 0; bottom: 0; min-width: 2px; }
.label, .note { font-size: .8rem; } .label { text-align: right; overflow-wrap: anywhere; } .missing { color: #a04000; }
"""


def build_page(runs: Sequence[RunRecord], num_gallery: int) -> str:
    """The HTML of the report on `runs`; parts that the runs left no record for are left out."""
    pictures = [
        (figures.reward_curves(runs), "Running mean of the sampled answers' task reward; one line per run."),
        (figures.miou_curves(runs), "Held-out mIoU before training and after each phase; one line per run."),
        (figures.training_curves(runs), "Running means over the steps; one line per run."),
        (figures.best_reward(runs), "Best sampled reward of each group: median, quartiles shaded."),
        (figures.reward_distribution(runs), "Sampled rewards early and late in reinforcement learning."),
        (figures.advantage_distribution(runs), "Advantages as the updates used them."),
        (figures.rule_comparison(runs), "What every rule would have made of the rewards of one of the runs."),
    ]
    sections = [
        ("Runs", _run_list(runs)),
        ("Scores", _score_table(score_table(runs), runs[0].task)),
        ("Speed", _speed_table(runs)),
        ("Curves and distributions", "".join(_figure(svg, caption) for svg, caption in pictures if svg)),
        ("Gallery", _gallery(runs, num_gallery)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Training report</title>'
        f"<style>{STYLE}</style></head><body><h1>Training report</h1>{body}</body></html>\n"
    )


def _run_list(runs: Sequence[RunRecord]) -> str:
    rows = [
        [run.folder.name, run.method, str(run.seed), run.config["model"]["model"], run.config["train"]["phases"]]
        for run in runs
    ]
    return _table(["folder", "method", "seed", "model", "phases"], rows)


def _score_table(rows: Sequence[ScoreRow], task: Task) -> str:
    if not rows:
        return ""
    names = list(rows[0].scores)
    header = ["method", "mode", "seeds", *names, f"{names[0]} against {rows[0].method}"]
    cells = [
        [row.method, row.mode, str(len(row.seeds)), *(str(row.scores[name]) for name in names), str(row.gain or "-")]
        for row in rows
    ]
    hint = "After the last phase: mean ± 95 % interval over the seeds (Student’s t), "
    if task == "grounding":
        hint += (
            "or over the queries where there is one seed. “Oracle of both” takes the better mode of each query by "
            "looking at the truth: an upper bound, not a result. "
        )
    else:
        hint += "as the runs logged their last evaluation. "
    hint += "The last column is paired by seed."
    return _table(header, cells) + _hint(hint)


def _gallery(runs: Sequence[RunRecord], num_shown: int) -> str:
    if runs[0].task == "highlight":
        return _hint("Left out: the answers of highlight detection rate clips and have no span to draw.")
    shown = gallery(runs, figures.method_colours(runs), num_shown)
    return shown and _hint("Held-out queries at equal distances from the first run’s worst answer to its best.") + shown


def _speed_table(runs: Sequence[RunRecord]) -> str:
    """Medians over the steps of each phase of each run."""
    medians = [
        (run.folder.name, phase, step_medians(run, ("time/", "perf/"), phase))
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
        "Medians over steps: seconds of the step and its parts, tokens per second, MFU."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _hint(text: str) -> str:
    return f'<p class="hint">{escape(text)}</p>'


def _figure(svg: str, caption: str) -> str:
    source = f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
    return f'<figure><img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>'

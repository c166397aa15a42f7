"""What a run ends with: evaluations after each phase, the table, the plots."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.evaluation.asking import evaluate, write_rows
from tempsamp_fast.evaluation.protocols import OWN
from tempsamp_fast.evaluation.published import METRICS
from tempsamp_fast.evaluation.scoring import best_constant_span, score_rows
from tempsamp_fast.run.checkpoint import EVALUATIONS, evaluation_scores, score_names
from tempsamp_fast.run.log import RunLog, write_json
from tempsamp_fast.run.run import Run
from tempsamp_fast.sample import Mode
from tempsamp_fast.system.files import own_folder, read_json
from tempsamp_fast.system.ranks import of_all_ranks

logger = logging.getLogger(__name__)


class Results:
    """Evaluates a run on its held-out samples and, at the end, prints the table and draws the plots.

    Rows are kept in RUN/results.json, so that a resumed run still prints all of them.
    """

    def __init__(self, run: Run):
        self.run = run
        self.path = run.folder / EVALUATIONS
        resumed = run.first_step > 0 and self.path.is_file()
        try:
            kept = read_json(self.path) if resumed else []
            self.rows: list[dict[str, Any]] = [row for row in kept if row["num_steps"] <= run.first_step]
            if self.rows:
                table(self.rows, 0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{self.path}: the evaluations so far cannot be read: {error!r}") from error
        metric = run.config.train.best_metric
        name = metric.rpartition("/")[2] if metric else "miou"
        if metric and (name not in METRICS or not run.eval_samples):
            flaw = choose_from(name, METRICS) if run.eval_samples else "there are no held-out samples"
            raise ValueError(f"best_metric={metric!r}: {flaw}")

    def make_up(self, log: RunLog) -> None:
        """Evaluate where the run begins or goes on, if that was not done: it may have been stopped there."""
        run = self.run
        if run.first_step == 0 and run.config.train.eval_start:
            self.evaluate("start", 0, log)
        num_steps = 0
        for index, phase in enumerate(run.phases, start=1):
            num_steps += phase.num_steps
            if num_steps == run.first_step:
                self.evaluate(f"{index}_{phase}", num_steps, log)
        every = run.config.train.eval_steps
        if every and run.first_step > 0 and run.first_step % every == 0:
            self.evaluate(f"step {run.first_step}", run.first_step, log)

    def evaluate(self, stage: str, num_steps: int, log: RunLog) -> bool:
        """Evaluate in every mode of `eval_modes`, until the run is to stop; writes RUN/eval/<stage>_<mode>.jsonl.

        Returns, the same on every rank, whether it is better than all of trained weights before by `best_metric`.
        """
        run = self.run
        if not run.eval_samples:
            return False
        done = [row["mode"] for row in self.rows if row["num_steps"] == num_steps]
        for mode in cast("list[Mode]", run.config.train.eval_modes.split("+")):
            if mode in done:
                continue
            logger.info("evaluating %d queries in %s mode", len(run.eval_samples), mode)
            how = run.config.algorithm.require_tags, run.config.data.answer_form
            given = run.greedy, run.loader, run.config.train.eval_batch_size, *how
            answers = evaluate(run.eval_samples, mode, *given, is_stopping=run.is_stopping)
            if answers is None:
                if run.rank == 0:
                    logger.warning("the evaluation was stopped; it is made up for when the run goes on")
                return False
            scores = score_rows(run.eval_samples, answers, run.config.data.task, *how)
            outside = {"outside_video": sum(row["outside_video"] for row in answers)}
            measured = {f"eval/{mode}/{name}": value for name, value in (scores | outside).items()}
            log.log(num_steps, "eval", measured, advance=False)
            row = {"stage": stage, "mode": mode, "num_steps": num_steps, "protocol": OWN, **scores}
            row["num_skipped"] = sum("skipped" in answer for answer in answers)
            self.rows.append(row)
            if run.rank == 0:
                own_folder(run.folder / "eval")
                write_rows(self.answers_path(stage, mode), answers)
                write_json(self.path, self.rows)
                logger.info("%s", table([row], len(answers)))
        return self._is_best(num_steps)

    def _is_best(self, num_steps: int) -> bool:
        metric = self.run.config.train.best_metric
        name = (metric or "").rpartition("/")[2]
        if name and name not in self.rows[-1]:
            raise ValueError(f"best_metric={metric!r}: {choose_from(name, score_names(self.rows[-1]))}")
        scores = evaluation_scores(self.rows, metric, self.run.config.train.eval_modes)
        earlier = [score for step, score in scores.items() if 0 < step < num_steps]
        return num_steps > 0 and scores[num_steps] > max(earlier, default=-1.0)

    def answers_path(self, stage: str, mode: str) -> Path:
        """Where the answers of one evaluation are kept."""
        folder = self.run.folder / ("eval/steps" if stage.startswith("step ") else "eval")
        return folder / f"{stage.replace('/', '_').replace(' ', '_')}_{mode}.jsonl"

    def finish(self) -> None:
        """Print the table of all evaluations, keep it in RUN/summary.json, and draw the plots into RUN/plots."""
        skipped = of_all_ranks(self.run.loader.skipped)
        if self.run.rank != 0:
            return
        reasons = {path: reason for part in skipped for path, reason in part.items()}
        if reasons:
            logger.warning("skipped videos: %d\n%s", len(reasons), "\n".join(reasons.values()))
        if self.run.eval_samples:
            is_highlight = self.run.config.data.task == "highlight"
            rows = self.rows if is_highlight else [*self.rows, self.constant_baseline()]
            minutes = (time.monotonic() - self.run.started_s) / 60
            summary = {"num_queries": len(self.run.eval_samples), "minutes": round(minutes, 1), "rows": rows}
            write_json(self.run.folder / "summary.json", summary)
            sys.stdout.write(table(rows, len(self.run.eval_samples)) + "\n")
        from tempsamp_fast.report.plots import plot_run

        for path in plot_run(self.run.folder):
            logger.info("plot: %s", path)

    def constant_baseline(self) -> dict[str, Any]:
        """The scores of a model that never looks: it always answers the span that fits the training set best."""
        span, _ = best_constant_span(self.run.train_samples)
        answers = [{"span": list(span)}] * len(self.run.eval_samples)
        scores = score_rows(self.run.eval_samples, answers, self.run.config.data.task)
        return {"stage": f"constant {span[0]:.1f}-{span[1]:.1f} s", "mode": "-", **scores}


def table(rows: Sequence[dict[str, Any]], num_queries: int) -> str:
    """Evaluations as text, one per line with the metrics of the task."""
    names = score_names(rows[0])
    lines = [f"{num_queries} held-out queries, protocol {OWN}: frames, prompt and parser of this run"]
    widths = [max(len(name), 5) + 2 for name in names]
    header = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines.append(f"{'after':<24}{'mode':<8}{header}")
    for row in rows:
        skipped = f"  {row['num_skipped']} skipped, counted as not read" if row.get("num_skipped") else ""
        figures = "".join(f"{row[name]:>{width}.3f}" for name, width in zip(names, widths, strict=True))
        lines.append(f"{row['stage']:<24}{row['mode']:<8}{figures}{skipped}")
    return "\n".join(lines)

"""`make demo`, or `tempsamp demo [--seed N]`: one start, the same questions, three methods side by side.

Draws ten-second videos with events of one or two seconds. The embedded base is trained with supervised steps, GRPO and
TempSamp-R1, the last one thinking too at its end, two runs at a time, one thread each. What it says of videos that none
has seen is one table, and a page with their frames: DEMO/report.html.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.demo.pretrain import HARD
from tempsamp_fast.demo.runs import draw, train_all
from tempsamp_fast.embedded.model import BASE
from tempsamp_fast.embedded.videos import SyntheticConfig
from tempsamp_fast.evaluation.scoring import answered_ious, best_constant_span
from tempsamp_fast.report.page import build_page
from tempsamp_fast.report.plots import eval_files, read_rows
from tempsamp_fast.report.runs import interval, over_queries, read_runs
from tempsamp_fast.rewards import best_iou
from tempsamp_fast.run.log import write_json
from tempsamp_fast.sample import Mode
from tempsamp_fast.system.files import log_printably, own_folder, write_file

VIDEOS = dataclasses.replace(HARD, num_train=1000, num_test=280)
ARMS = {
    "tempsamp": "tempsamp/answer:160@3e-4,tempsamp/answer+think:60@3e-4",
    "sft": "sft/answer:160@3e-4",
    "grpo": "grpo/answer:160@3e-4",
}
"""Phases of each run, the longest first."""
ROWS = {
    "start": ("tempsamp", 0),
    "SFT": ("sft", 1),
    "GRPO": ("grpo", 1),
    "TempSamp-R1": ("tempsamp", 1),
    "TempSamp-R1, thinking": ("tempsamp", 2),
}
"""Rows of the table: whose evaluation, after which phase."""
CONSTANT = "constant"
DIFFERENCES = (
    ("TempSamp-R1", CONSTANT, "answer"),
    ("TempSamp-R1", "GRPO", "answer"),
    ("TempSamp-R1", "SFT", "answer"),
    ("TempSamp-R1, thinking", "start", "think"),
)
"""First over second, asked in a mode; the constant is the same in both."""
METRICS = {"miou": "mIoU", "r1@0.3": "R1@0.3", "r1@0.5": "R1@0.5", "r1@0.7": "R1@0.7", "parse_rate": "parsed"}
Ious = dict[tuple[str, str], list[float | None]]
"""One per held-out query by row and mode; None where the answer did not parse."""


def demo(
    folder: Path, data: Path, seed: int, arms: Mapping[str, str] = ARMS, videos: SyntheticConfig = VIDEOS
) -> dict[str, Any]:
    """Draw, train and compare in `folder`, going on where that was begun; returns what DEMO/demo.json keeps.

    Shares are in [0, 1]. Raises ValueError for a folder that was begun otherwise, RuntimeError for a run that failed.
    """
    started_s = time.monotonic()
    words = ["--config=demo", f"--model={BASE}", f"--seed={seed}", *draw(data, videos)]
    train_all(own_folder(folder), {name: [*words, f"--phases={phases}"] for name, phases in arms.items()})
    ious = read_ious(folder, data)
    minutes = round((time.monotonic() - started_s) / 60, 1)
    found = {"seed": seed, "num_queries": len(ious[CONSTANT, "answer"]), "minutes": minutes} | compare(ious)
    write_json(folder / "demo.json", found)
    write_file(folder / "report.html", build_page(read_runs([folder / name for name in sorted(arms)]), num_gallery=8))
    return found


def read_ious(folder: Path, data: Path) -> Ious:
    """What the runs in `folder` answered, and the one span that answers the training queries best."""
    found: Ious = {}
    for mode in get_args(Mode):
        for row, (run, stage) in ROWS.items():
            found[row, mode] = answered_ious(read_rows(eval_files(folder / run, mode)[stage]))
    train, test = (load_annotations(data / f"annotations/{split}.json") for split in ("train", "test"))
    span, _ = best_constant_span(train)
    found[CONSTANT, "answer"] = [best_iou(span, sample.windows) for sample in test]
    return found


def compare(ious: Ious) -> dict[str, Any]:
    """Scores of each row and their `DIFFERENCES`, each a mean with its 95 % interval over the queries."""
    rows = []
    for (row, mode), values in ious.items():
        scores = over_queries(values)
        means = {name: [scores[name].mean, scores[name].half_width] for name in METRICS}
        rows.append({"after": row, "mode": "-" if row == CONSTANT else mode} | means)
    differences = [
        {"first": first, "over": second, "mode": mode} | _difference(ious[first, mode], ious[second, mode])
        for first, second, mode in DIFFERENCES
    ]
    return {"rows": rows, "differences": differences}


def _difference(first: Sequence[float | None], second: Sequence[float | None]) -> dict[str, list[float]]:
    pairs = [(one or 0.0, other or 0.0) for one, other in zip(first, second, strict=True)]
    values = {
        "miou": [one - other for one, other in pairs],
        "r1@0.7": [float(one >= 0.7) - float(other >= 0.7) for one, other in pairs],
    }
    return {name: [(over := interval(each)).mean, over.half_width] for name, each in values.items()}


def table(found: Mapping[str, Any]) -> str:
    """The scores in per cent with their intervals, and what they differ by, as text."""
    lines = [f"{'after':<24}{'mode':<8}" + "".join(f"{title:>13}" for title in METRICS.values())]
    for row in found["rows"]:
        cells = (f"{100 * row[name][0]:.1f} ± {100 * row[name][1]:.1f}" for name in METRICS)
        lines.append(f"{row['after']:<24}{row['mode']:<8}" + "".join(f"{cell:>13}" for cell in cells))
    lines += [f"{found['num_queries']} held-out queries, in per cent, ± 95 % over queries; points, by query:", ""]
    for row in found["differences"]:
        gains = (f"{METRICS[name]} {100 * row[name][0]:+.1f} ± {100 * row[name][1]:.1f}" for name in ("miou", "r1@0.7"))
        lines.append(f"{row['first']} over {row['over']}, asked to {row['mode']}: {', '.join(gains)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 2 and one line on stderr where it cannot be run."""
    log_printably()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        prog="tempsamp demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the questions and of sampling")
    new = Path(datetime.now().strftime("runs/demo_%Y%m%d_%H%M%S"))
    parser.add_argument("--out", type=Path, default=new, metavar="DEMO", help="folder; one that was begun goes on")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="where the videos are kept")
    options = parser.parse_args(arguments)
    try:
        found = demo(options.out, options.data, options.seed)
    except (ValueError, OSError, RuntimeError) as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "error: Ctrl-C\n")
    runs = "\n".join(f"    {options.out / name}" for name in ARMS)
    sys.stdout.write(f"{table(found)}\n\nThe runs:\n{runs}\nTheir answers, with frames: {options.out}/report.html\n")


if __name__ == "__main__":
    main()

"""Score predictions: `python -m tempsamp_fast.score --predictions RUN_OR_FILE --annotations FILE [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.catalogue import dataset_name
from tempsamp_fast.data.formats import FORMATS
from tempsamp_fast.evaluation.protocols import OWN, PROTOCOLS, protocol_for
from tempsamp_fast.evaluation.scoring import read_predictions, score_rows
from tempsamp_fast.sample import AnswerForm, Mode, Task
from tempsamp_fast.system.files import log_printably, one_line


def answers_file(given: str) -> Path:
    """The newest answers of a run folder or of one that `eval` left, told on stderr; a file is itself.

    Raises ValueError for any other folder.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    of_eval = [file for mode in get_args(Mode) if (file := path / f"{mode}.jsonl").is_file()]
    files = sorted([*(path / "eval").glob("*.jsonl"), *of_eval], key=lambda file: file.stat().st_mtime_ns)
    if not files:
        raise ValueError(f"--predictions {given}: has no answers, neither a run's (eval/*.jsonl) nor those of eval")
    print(f"scoring {files[-1]}", file=sys.stderr)
    return files[-1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, print the metrics."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.score", description="Score predicted spans.")
    parser.add_argument(
        "--predictions",
        required=True,
        help="folder of a run or of eval (its newest answers), or JSON lines: sample_id or qid (or vid and query), and "
        "text or spans",
    )
    parser.add_argument("--annotations", required=True, help="annotation file with the ground truth")
    parser.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="format of the annotation file")
    parser.add_argument("--videos", help="folder of the videos, for the durations where the file has none")
    parser.add_argument("--task", choices=get_args(Task), help="default: grounding")
    parser.add_argument("--protocol", choices=PROTOCOLS, help="published way to read and count")
    parser.add_argument("--answer_form", choices=get_args(AnswerForm), default="text", help="in which a run answered")
    parser.add_argument("--untagged", action="store_true", help="read answers without <answer> tags too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        if options.protocol and (options.task or options.untagged):
            raise ValueError(f"--protocol {options.protocol} says itself what counts: leave out --task and --untagged")
        samples = load_annotations(options.annotations, options.videos, options.format)
        rows = read_predictions(answers_file(options.predictions), samples)
        if options.protocol:
            protocol = protocol_for(options.protocol, dataset_name(options.annotations))
            metrics, followed = protocol.scores(samples, rows), str(protocol)
        else:
            metrics = score_rows(samples, rows, options.task or "grounding", not options.untagged, options.answer_form)
            followed = f"{OWN}: answers of the form {options.answer_form}" + (", untagged too" * options.untagged)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")
    if metrics.get("parse_rate") == 0:
        sys.stderr.write(f"warning: no answer could be read ({followed}): see --answer_form, --untagged\n")
    metrics = {"num_queries": len(samples), **metrics}
    if options.json:
        print(json.dumps({"protocol": options.protocol or OWN, **metrics}))
    else:
        print(f"protocol {followed}")
        print("\n".join(f"{name:12} {value:>8.4g}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()

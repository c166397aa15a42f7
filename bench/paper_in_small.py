"""The paper's claims on the embedded data, on a CPU, with paired seeds: all runs by one command, resumable run by run.

    python bench/paper_in_small.py [--work DIR] [--results FILE] [--workers 2]    # make what is missing
    python bench/paper_in_small.py --only tree core/grpo                          # some families or methods alone
    python bench/paper_in_small.py --summary                                      # state what the results say
    python bench/paper_in_small.py --list                                         # the planned runs

Each run is `tempsamp_fast/train.py` in a process of its own on one thread. The results file is replaced after every
run; two campaigns may write to one. A campaign goes on where it stopped, on another machine and commit too, if its
settings are the same and the models that its runs begin from come out the same once more. `--summary` writes the
figures and a page of tables beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # a checkout runs without being installed

from bench.paper.campaign import Campaign  # noqa: E402
from bench.paper.evidence import evidence  # noqa: E402
from bench.paper.plan import FAMILIES, PILOT_RATES, pilot_runs, planned_runs  # noqa: E402
from bench.paper.plots import draw  # noqa: E402
from bench.paper.results import read_results  # noqa: E402
from bench.paper.summary import summarise  # noqa: E402

RESULTS = ROOT / "bench/results/paper_in_small.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/paper_in_small", help="where runs are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[family.replace(" ", "_") for family in FAMILIES],
        help="runs to make: how their names begin",
    )
    parser.add_argument("--rate", type=float, help="learning rate of all runs, in place of pilots that choose it")
    parser.add_argument("--summary", action="store_true", help="print and draw what the results say; make no run")
    parser.add_argument("--list", action="store_true", help="print the planned runs; make none")
    options = parser.parse_args()
    if options.list:
        print("\n".join(run.name for run in [*pilot_runs(), *planned_runs(PILOT_RATES[0])]))
        return
    try:
        if not options.summary:
            Campaign(options.work, options.results).make(options.workers, options.only, options.rate)
        results = read_results(options.results)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    text = "\n\n".join([summarise(results).rstrip(), *filter(None, evidence(results))]) + "\n"
    options.results.with_suffix(".md").write_text(text)
    print(text)
    for path in draw(results, options.results):
        print(path)


if __name__ == "__main__":
    main()

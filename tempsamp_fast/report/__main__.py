"""`python -m tempsamp_fast.report RUN [RUN...] [--out FILE]`: compare runs on one self-contained HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.report.page import build_page
from tempsamp_fast.report.runs import read_runs
from tempsamp_fast.system.files import log_printably, one_line, write_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the page; exits with 2 for a folder that holds no run."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the baseline")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the first run's folder")
    parser.add_argument("--gallery", type=int, default=8, help="held-out queries to show with frames")
    options = parser.parse_args(arguments)
    out = options.out or options.runs[0] / "report.html"
    try:
        write_file(out, build_page(read_runs(options.runs), options.gallery))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")
    except Exception as error:  # records of anything make drawing raise every kind
        folders = ", ".join(map(str, options.runs))
        parser.exit(2, f"error: {one_line(f'{folders}: hold what no run writes ({error!r:.200})')}\n")
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()

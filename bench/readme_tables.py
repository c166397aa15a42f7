"""Write the README's tables from the committed results: `python bench/readme_tables.py`; `--check` only compares.

`--demo RUN` first takes the results of a run of `make demo`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"


def demo_table() -> str:
    """The evaluations of the committed demo run, and the baseline that never looks."""
    demo = json.loads((RESULTS / "demo.json").read_text())
    lines = ["| after | mode | mIoU | R1@0.3 | R1@0.5 | R1@0.7 | parse rate |", "|---|---|---|---|---|---|---|"]
    names = ("miou", "r1@0.3", "r1@0.5", "r1@0.7", "parse_rate")
    for row in demo["rows"]:
        figures = " | ".join(f"{100 * row[name]:.1f}" for name in names)
        lines.append(f"| {row['stage']} | {row['mode']} | {figures} |")
    counts = f"{demo['num_queries']} held-out queries, in per cent; {demo['minutes']:.0f} minutes on {demo['machine']}."
    lines += ["", counts]
    return "\n".join(lines)


TABLES = {"demo": demo_table}


def take_demo(run: Path) -> None:
    """Keep what a run of `make demo` measured, and on how many threads of what."""
    summary = json.loads((run / "summary.json").read_text())
    machine = json.loads((run / "machine.json").read_text())
    summary["machine"] = f"{machine['num_threads']} threads, {', '.join(machine['devices'])}"
    summary["versions"] = machine["versions"]
    (RESULTS / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")


def filled(text: str) -> str:
    """The README with every `<!-- NAME table -->` ... `<!-- end -->` block made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} table -->\n).*?(<!-- end -->)", re.DOTALL)
        assert block.search(text), f"README.md has no place for the {name} table"
        table = make()
        text = block.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README is out of date")
    parser.add_argument("--demo", type=Path, metavar="RUN")
    options = parser.parse_args()
    if options.demo:
        take_demo(options.demo)
    current = README.read_text()
    wanted = filled(current)
    if options.check:
        return int(current != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())

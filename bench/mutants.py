"""Which small faults the tests notice: every mutant of bench/mutation/list, one at a time, in a copy of the checkout.

    python bench/mutants.py [--only LIST[/MODULE[/ID]] ...] [--warm] [--jobs N] [--budget SECONDS] [--again] [--table]

First each test file is run once while the lines that its tests run are recorded. Then each mutant meets the tests that
run its statement, what noticed it before, then near and cheap ones, until one fails. It survives when all of them have
passed, and stays open when they would take longer than the budget. Verdicts are kept as they come: a mutant is judged
again only when its file has changed, or the test that killed it, or, if it survived, any test. Ends with the table in
bench/results.

With --warm, mutants are put into one process that has loaded all tests, which forks for each: ten times as fast. What
no test notices there within the budget is left to a run without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.mutation.fork import Child, Tree, preload, start  # noqa: E402
from bench.mutation.mutant import Mutant, read_mutants  # noqa: E402
from bench.mutation.reach import Reach, Recording, digest, inputs_of, stale, tests_reaching  # noqa: E402
from bench.mutation.table import write_table  # noqa: E402
from bench.mutation.verdict import FirstFailure  # noqa: E402
from bench.mutation.warm import Warm  # noqa: E402

WORK = ROOT / "build/mutants"
CACHE = ("-o", f"cache_dir={WORK / 'pytest_cache'}")
"""Where tests keep what takes long to make, such as the corpus of videos."""
WARM_BUDGET_S = 20.0
FIRST_PART_S = 20.0
"""Seconds of tests that a mutant meets before further test files are collected."""


def record(root: Path, trees: Sequence[Tree], reach: Reach) -> None:
    """Bring `reach` up to date, a test file at a time."""
    files = sorted(str(path.relative_to(root)) for path in (root / "tests").rglob("test_*.py"))
    for gone in set(reach) - set(files):
        del reach[gone]
    waiting = [file for file in files if stale(root, reach, file)]

    def ask(tree: Tree, file: str) -> Child:
        return start(tree, [*CACHE, file], Recording(tree.path, tree.scratch / "reach.json"), 1800.0)

    def note(tree: Tree, file: str, child: Child, how: str) -> None:
        out = tree.scratch / "reach.json"
        tests = json.loads(out.read_text()) if out.exists() else {}
        failed = [name for name, test in tests.items() if not test["passed"]]
        seconds = time.monotonic() - child.started
        print(f"recorded {file}: {len(tests)} tests, {seconds:.0f} s", *failed, how, flush=True)
        reach[file] = {"inputs": inputs_of(root, file, tests), "tests": tests}
        (WORK / "reach.json").write_text(json.dumps(reach))

    spread(trees, waiting, ask, note)


def spread(trees: Sequence[Tree], items: Sequence[Any], ask: Any, note: Any) -> None:
    """A child for each item, one at a time in each tree; `ask` starts it, `note` takes what it left.

    `note` may return a further item, which comes next.
    """
    waiting = list(items)[::-1]
    running: dict[Tree, tuple[Any, Child]] = {}
    while waiting or running:
        for tree in trees:
            if tree not in running and waiting:
                item = waiting.pop()
                running[tree] = item, ask(tree, item)
        time.sleep(0.05)
        for tree, (item, child) in list(running.items()):
            if how := child.poll():
                del running[tree]
                further = note(tree, item, child, how)
                if further is not None:
                    waiting.append(further)


def parts_of(root: Path, mutant: Mutant, reach: Reach, killer: str) -> list[tuple[list[str], list[str], float]]:
    """The `killer` of old, then cheap tests, then dearer ones.

    Each part (files, node ids, seconds) may take three times the one before.
    """
    parts: list[tuple[list[str], list[str], float]] = []
    limit_s = FIRST_PART_S / 3
    found = tests_reaching(root, reach, mutant)
    if any(killer in names for _, names, _ in found):
        parts.append(([killer.partition("::")[0]], [killer], limit_s))
    for file, names, seconds in found:
        if not parts or parts[-1][2] + seconds > limit_s:
            parts.append(([], [], 0.0))
            limit_s *= 3
        files, chosen, total = parts[-1]
        parts[-1] = ([*files, file], chosen + names, total + seconds)
    return parts


def judge(root: Path, trees: Sequence[Tree], mutants: Sequence[Mutant], reach: Reach, budget_s: float) -> None:
    """Append a verdict on every mutant to the results."""
    earlier = last_rows()

    def ask(tree: Tree, item: tuple[Mutant, list[Any], int]) -> Child:
        mutant, parts, index = item
        files, names, seconds = parts[index]
        tree.put(mutant.file, mutant.apply(root))
        plugin = FirstFailure(names, tree.scratch / "verdict.json")
        return start(tree, [*CACHE, "-x", *files], plugin, 120 + 10 * seconds)

    def note(tree: Tree, item: tuple[Mutant, list[Any], int], child: Child, how: str) -> Any:
        mutant, parts, index = item
        tree.put(mutant.file, (root / mutant.file).read_text())
        out = tree.scratch / "verdict.json"
        test = json.loads(out.read_text()) if out.exists() else ""
        seconds = time.monotonic() - child.started
        if how == "timed out" or test or how.startswith("signal"):
            verdict = "timed out" if how == "timed out" else "killed"
            return keep(root, mutant, verdict, test or f"{parts[index][0][0]} {how}", seconds)
        if how != "ended" or not out.exists():
            raise RuntimeError(f"mutant {mutant.name}: pytest did not run: {how}: {child.log.read_text()[-2000:]}")
        if index + 1 < len(parts):
            if parts[index + 1][2] > budget_s:
                return keep(root, mutant, "open", "", seconds)
            return mutant, parts, index + 1
        return keep(root, mutant, "survived", "", seconds)

    items = []
    for mutant in mutants:
        parts = parts_of(root, mutant, reach, earlier.get(mutant.name, {"test": ""})["test"])
        if parts:
            items.append((mutant, parts, 0))
        else:
            keep(root, mutant, "survived", "", 0.0)
    spread(trees, items, ask, note)


def judge_warm(tree: Tree, root: Path, mutants: Sequence[Mutant], reach: Reach, budget_s: float) -> None:
    """Append a verdict on every mutant that a test notices in a fork of one process that has loaded all of them."""

    def note(mutant: Mutant, test: str, seconds: float) -> None:
        if test:
            keep(root, mutant, "killed", test, seconds)
        else:
            print(f"{mutant.name:40} not noticed in place {seconds:6.1f} s", flush=True)

    killers = {name: row["test"] for name, row in last_rows().items()}
    child = start(tree, [*CACHE, "tests"], Warm(tree.path, mutants, killers, reach, budget_s, note), float("inf"))
    while not (how := child.poll()):
        time.sleep(0.5)
    sys.stdout.write(child.log.read_text())
    if how != "ended":
        raise RuntimeError(f"pytest did not run: {how}")


def keep(root: Path, mutant: Mutant, verdict: str, test: str, seconds: float) -> None:
    row = {
        "name": mutant.name,
        "verdict": verdict,
        "test": test,
        "seconds": round(seconds, 1),
        **keys(root, mutant, test),
    }
    with (WORK / "verdicts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{mutant.name:40} {verdict:10} {seconds:6.1f} s  {test}", flush=True)


def keys(root: Path, mutant: Mutant, test: str) -> dict[str, str]:
    """What a verdict rests on: the faulty file, and the test that noticed, or all tests where none did."""
    source = hashlib.sha256(mutant.apply(root).encode()).hexdigest()[:16]
    if test:
        return {"source": source, "tests": digest(root / test.partition("::")[0].partition(" ")[0])}
    everything = "".join(digest(path) for path in sorted((root / "tests").rglob("*.py")))
    return {"source": source, "tests": hashlib.sha256(everything.encode()).hexdigest()[:16]}


def last_rows() -> dict[str, dict[str, Any]]:
    """The last verdict on each mutant, whether it still holds or not."""
    path = WORK / "verdicts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["name"]: row for row in rows}


def verdicts(root: Path, mutants: Sequence[Mutant]) -> dict[str, dict[str, Any]]:
    """The last verdict on each mutant that still holds."""
    last = last_rows()
    return {
        mutant.name: row
        for mutant in mutants
        if (row := last.get(mutant.name))
        and all(row[key] == value for key, value in keys(root, mutant, row["test"]).items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=[], help="mutants whose name begins so, such as learning/advantage"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of tests that a mutant may take")
    parser.add_argument("--warm", action="store_true", help="judge in place, only what is noticed")
    parser.add_argument("--again", action="store_true", help="judge also what is judged already")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    every = read_mutants()
    mutants = [m for m in every if not options.only or f"{m.name}/".startswith(tuple(f"{o}/" for o in options.only))]
    if not mutants:
        parser.error(f"--only: no mutant of {', '.join(options.only)}")
    for mutant in every:
        mutant.apply(ROOT)
    WORK.mkdir(parents=True, exist_ok=True)
    if not options.table:
        preload()
        source = Tree(ROOT)  # the checkout may change meanwhile
        trees = [Tree(source) for _ in range(options.jobs)]
        stored = WORK / "reach.json"
        reach: Reach = json.loads(stored.read_text()) if stored.exists() else {}
        if not options.warm:
            record(source.path, trees, reach)
        known = {} if options.again else verdicts(source.path, mutants)
        waiting = [mutant for mutant in mutants if known.get(mutant.name, {"verdict": "open"})["verdict"] == "open"]
        if options.warm:
            judge_warm(source, ROOT, waiting, reach, min(options.budget, WARM_BUDGET_S))
        else:
            judge(source.path, trees, waiting, reach, options.budget)
    from tempsamp_fast.run.log import commit_of_code  # not before the tests are run: theirs is the copy's

    write_table(every, verdicts(ROOT, every), ROOT / "bench/results", commit_of_code())


if __name__ == "__main__":
    main()

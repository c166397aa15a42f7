"""The list of mutants: small harmful faults, each one replacement in one file."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

LIST = Path(__file__).with_name("list")
ENTRY = {"id", "old", "new", "why", "at", "judgement"}


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    """`list/module/id`, of the file in list/ and the module's file."""
    file: str
    """From the root of the repository."""
    old: str
    new: str
    why: str
    """What it would cost a user who is not told."""
    at: int | None = None
    """Which occurrence of `old`, from 0, where there are several."""
    judgement: str | None = None
    """Why it is right that no test notices, where somebody looked into it."""

    def apply(self, root: Path) -> str:
        """The text of the file with the fault in it; ValueError where `old` is not there, or more often than once."""
        text = (root / self.file).read_text()
        places = text.split(self.old)
        count = len(places) - 1
        if count == 0 or (self.at is None and count > 1) or (self.at is not None and self.at >= count):
            raise ValueError(f"mutant {self.name}: {self.old!r} is {count} times in {self.file} (at: {self.at})")
        cut = (self.at or 0) + 1
        return self.old.join(places[:cut]) + self.new + self.old.join(places[cut:])

    def lines(self, root: Path) -> tuple[range, bool]:
        """The lines whose running reaches the fault, and whether they run at import only."""
        text = (root / self.file).read_text()
        places = text.split(self.old)[: (self.at or 0) + 1]
        start = len(self.old.join(places))
        changed = start + next((i for i, (a, b) in enumerate(zip(self.old, self.new, strict=False)) if a != b), 0)
        number = text.count("\n", 0, changed) + 1
        return _reach(ast.parse(text), number)


def _reach(tree: ast.Module, number: int) -> tuple[range, bool]:
    """Of the innermost statement around line `number`: its lines, or those of a function whose header it is."""
    innermost: ast.stmt | None = None
    in_function = False
    nodes: Sequence[ast.AST] = tree.body
    while nodes:
        around = next((node for node in nodes if _first_line(node) <= number <= (getattr(node, "end_lineno", 0))), None)
        if around is None:
            break
        if isinstance(around, ast.stmt):
            innermost = around
            body = getattr(around, "body", None)
            is_function = isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(body, list) and number < body[0].lineno:
                last = around.end_lineno or number
                return range(_first_line(around), (last if is_function else body[0].lineno - 1) + 1), (
                    not is_function and not in_function
                )
            in_function = in_function or is_function
        nodes = list(ast.iter_child_nodes(around))
        nodes = [node for node in nodes if isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case))]
    if innermost is None:
        return range(number, number + 1), True
    return range(innermost.lineno, (innermost.end_lineno or number) + 1), not in_function


def _first_line(node: ast.AST) -> int:
    decorators = getattr(node, "decorator_list", [])
    first: int = getattr(node, "lineno", getattr(getattr(node, "pattern", None), "lineno", 0))
    return min([first, *(each.lineno for each in decorators)])


def read_mutants(folder: Path = LIST) -> list[Mutant]:
    """Every mutant of the list. Raises ValueError naming an entry that is not as it should be."""
    found = []
    for path in sorted(folder.glob("*.yaml")):
        for file, entries in yaml.safe_load(path.read_text()).items():
            for entry in entries:
                if set(entry) - ENTRY or not {"id", "old", "new", "why"} <= set(entry):
                    raise ValueError(f"{path}: an entry of {file} has the fields {', '.join(entry)}")
                name = f"{path.stem}/{Path(file).stem}/{entry.pop('id')}"
                found.append(Mutant(name, file, **entry))
    names = [mutant.name for mutant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{folder}: names that come twice: {', '.join(sorted(twice))}")
    return found

"""The list of faults that bench/mutants.py puts into the code, and how it finds the tests that can notice one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from bench.mutation.mutant import Mutant, read_mutants
from bench.mutation.reach import digest, not_meeting
from bench.mutation.reach import tests_reaching as reaching
from bench.mutation.swap import swap
from bench.mutation.table import write_table
from bench.mutation.warm import nearest

ROOT = Path(__file__).parents[1]
SOURCE = """\
LIMIT = 3


def capped(number, most=LIMIT):
    if number > most:
        return (
            most
        )
    return number
"""


def test_every_mutant_changes_the_code_and_compiles() -> None:
    mutants = read_mutants()
    assert len(mutants) > 230
    for mutant in mutants:
        faulty = mutant.apply(ROOT)
        assert faulty != (ROOT / mutant.file).read_text(), mutant.name
        compile(faulty, mutant.file, "exec")


def test_a_text_that_is_missing_or_not_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert "< most" in Mutant("m", "a.py", "> most", "< most", "").apply(tmp_path)
    assert Mutant("m", "a.py", "LIMIT", "4", "", at=1).apply(tmp_path).count("LIMIT") == 1
    for wrong in (Mutant("m", "a.py", "least", "", ""), Mutant("m", "a.py", "LIMIT", "4", "")):
        with pytest.raises(ValueError, match=r"mutant m: .* times in a\.py"):
            wrong.apply(tmp_path)


@pytest.mark.parametrize(
    ("old", "lines", "at_import"),
    [
        ("= 3", range(1, 2), True),
        ("most=LIMIT", range(4, 10), False),
        ("number > most", range(5, 6), False),
        ("            most", range(6, 9), False),
    ],
)
def test_a_fault_is_reached_by_its_whole_statement(tmp_path: Path, old: str, lines: range, at_import: bool) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert Mutant("m", "a.py", old, "", "").lines(tmp_path) == (lines, at_import)


def test_a_mutant_meets_every_test_that_runs_it_near_and_cheap_ones_first(tmp_path: Path) -> None:
    source = tmp_path / "tempsamp_fast/a.py"
    source.parent.mkdir()
    source.write_text(SOURCE)

    def test(seconds: float, *lines: int, passed: bool = True) -> dict[str, object]:
        return {"seconds": seconds, "passed": passed, "lines": {"tempsamp_fast/a.py": list(lines)}}

    reach = {
        "tests/test_far.py": {"tests": {"slow": test(2.0, 5), "quick": test(0.5, 5, 6), "elsewhere": test(0.1, 9)}},
        "tests/test_a.py": {"tests": {"near": test(3.0, 5), "broken": test(0.1, 5, passed=False)}},
    }
    mutant = Mutant("m", "tempsamp_fast/a.py", "number > most", "number < most", "")
    assert reaching(tmp_path, reach, mutant) == [
        ("tests/test_a.py", ["near"], 3.0),
        ("tests/test_far.py", ["quick", "slow"], 2.5),
    ]
    recorded = {file: {"inputs": {"tempsamp_fast/a.py": digest(source)}, **entry} for file, entry in reach.items()}
    assert not_meeting(tmp_path, recorded, mutant) == {"elsewhere", "broken"}
    recorded["tests/test_far.py"]["inputs"] = {"tempsamp_fast/a.py": "of another text"}
    assert not_meeting(tmp_path, recorded, mutant) == {"broken"}
    constant = Mutant("m", "tempsamp_fast/a.py", "= 3", "= 4", "")
    assert [names for _, names, _ in reaching(tmp_path, reach, constant)] == [["near"], ["elsewhere", "quick", "slow"]]


def test_the_table_counts_verdicts_and_shows_survivors(tmp_path: Path) -> None:
    mutants = [Mutant(f"learning/loss/{name}", "a.py", "x | y", "", f"why {name}") for name in ("a", "b", "c")]
    verdicts = {
        "learning/loss/a": {"verdict": "killed", "test": "tests/test_laws.py::test_law"},
        "learning/loss/b": {"verdict": "survived", "test": ""},
    }
    write_table(mutants, verdicts, tmp_path, "abcdefgh")
    text = (tmp_path / "mutants.md").read_text()
    assert "| learning/loss | 3 | 1 | 0 | 1 | 1 | laws 1 |" in text and "earlier" not in text
    assert "| learning/loss/b | `x \\| y` → nothing | why b |  |" in text
    assert "why c" not in text
    write_table(mutants, {"learning/loss/c": verdicts["learning/loss/a"]}, tmp_path, "ijklmnop")
    text = (tmp_path / "mutants.md").read_text()
    assert "2 of 3 noticed, 0 not judged yet; 2 of the verdicts are of earlier commits" in text
    rows = json.loads((tmp_path / "mutants.json").read_text())
    assert [row["commit"] for row in rows] == ["abcdefg", "abcdefg", "ijklmno"]


LOADED = """\
from dataclasses import dataclass
from functools import cache

LIMIT, NAMES = 3, {"most": len}


@cache
def capped(number, most=LIMIT):
    return min(number, most, LIMIT)


@dataclass
class Box:
    width: int = 2

    @property
    def area(self):
        return self.width * self.width
"""


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("min(number", "max(number", [7, 4, 3, ["most"]]),
        ("most=LIMIT", "most=1", [1, 4, 3, ["most"]]),
        ("LIMIT, NAMES = 3", "LIMIT, NAMES = 2", [2, 4, 2, ["most"]]),
        ("width: int = 2", "width: int = 5", [3, 25, 3, ["most"]]),
        ("self.width * self.width", "self.width", [3, 2, 3, ["most"]]),
        ('{"most": len}', '{"least": len}', [3, 4, 3, ["least"]]),
    ],
)
def test_a_fault_is_put_into_what_others_hold_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, expected: list
) -> None:
    module = ModuleType("held_by_others")
    module.__file__ = str(tmp_path / "held_by_others.py")
    monkeypatch.setitem(sys.modules, "held_by_others", module)
    exec(compile(LOADED, module.__file__, "exec", dont_inherit=True), vars(module))
    capped, box, names = module.capped, module.Box, module.NAMES
    assert not swap(module, LOADED) and [capped(7), box().area] == [3, 4]
    assert swap(module, LOADED.replace(old, new))
    assert [capped(7), box().area, module.LIMIT, list(names)] == expected


def test_near_tests_meet_a_mutant_first_and_variants_take_turns() -> None:
    names = ["tests/kernels/test_a.py::t", "tests/run/test_a.py::t", "tests/run/test_b.py::t[1]"]
    names += ["tests/run/test_b.py::t[2]", "tests/model/test_c.py::t"]
    items = [SimpleNamespace(nodeid=name, fixturenames=["trainer"] if "[" in name else []) for name in names]
    order = [names.index(item.nodeid) for item in nearest(items, "tempsamp_fast/run/b.py")]
    assert order == [2, 3, 1, 4, 0]

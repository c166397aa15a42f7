"""SECURITY.md claims what is attacked: a row for every test, and a test for every row."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_row_has_its_test_and_every_test_its_row() -> None:
    text = (TESTS.parent / "SECURITY.md").read_text()
    rows = Counter(re.findall(r"\| `(test_\w+)` \|$", text, re.MULTILINE))
    files = [path for path in TESTS.rglob("*.py") if path.parent == Path(__file__).parent or "security" in path.name]
    found = Counter(name for path in files if path != Path(__file__)
                    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))  # fmt: skip
    assert rows == found
    claims = [line for line in text.splitlines() if line.startswith("| ") and "**" not in line]
    assert len(claims) - 1 == len(rows), "a row without a test"

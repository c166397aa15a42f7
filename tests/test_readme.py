"""The README says what the committed results and the tree say."""

import re
from pathlib import Path

from bench.readme_tables import README, ROOT, filled


def test_tables_are_those_of_the_committed_results() -> None:
    text = README.read_text()
    assert filled(text) == text, "run `python bench/readme_tables.py`"


def test_every_file_of_the_map_exists() -> None:
    places = re.search(r"## Where things are\n(.*?)\n\*\*To add", README.read_text(), re.DOTALL)
    assert places
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", places[1]):
        assert any((ROOT / folder / name).exists() for folder in (Path(), Path("tempsamp_fast"))), name

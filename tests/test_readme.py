"""README and docs/ say what the committed results and the tree say."""

import re
from collections import Counter
from itertools import chain
from pathlib import Path

from bench.readme_tables import PAGES, ROOT, TABLES, filled
from tempsamp_fast.arguments import FIELDS

LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def test_tables_are_those_of_the_committed_results() -> None:
    stale = [page.name for page in PAGES if filled(page.read_text()) != page.read_text()]
    assert not stale, "run `python bench/readme_tables.py`"


def test_every_table_has_one_place() -> None:
    places = chain.from_iterable(re.findall(r"<!-- (\w+) table -->", page.read_text()) for page in PAGES)
    assert Counter(places) == Counter(list(TABLES))


def test_every_link_leads_to_a_file() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "kernels/README.md"]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text())]
    assert len(links) > 15
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]


def test_every_flag_is_a_setting_or_one_of_a_command() -> None:
    """But for multi_node.md, whose flags are those of other programs."""
    ours = [*ROOT.glob("tempsamp_fast/**/*.py"), *ROOT.glob("bench/**/*.py"), ROOT / "Makefile"]
    typed = set(re.findall(r"--([a-z][\w-]+)", "\n".join(source.read_text() for source in ours)))
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "kernels/README.md"]
    pages = [page for page in pages if page.name != "multi_node.md"]
    flags = {(page.name, flag) for page in pages for flag in re.findall(r"--([a-z][\w-]+)", page.read_text())}
    assert len(flags) > 60
    known = {*FIELDS, *(name.replace("_", "-") for name in FIELDS), *typed, "index-url"}
    assert not sorted((page, flag) for page, flag in flags if flag not in known)


def test_every_file_of_the_map_exists() -> None:
    places = re.search(r"## Where things are\n(.*?)\n\*\*To add", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert places
    for name in re.findall(r"`([\w./]+(?:\.py|/))`", places[1]):
        assert any((ROOT / folder / name).exists() for folder in (Path(), Path("tempsamp_fast"))), name


def test_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """Each in the first column is looked for piece by piece, `...` standing for what differs."""
    sources = [*ROOT.glob("tempsamp_fast/**/*.py"), *ROOT.glob("csrc/*.cpp")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(source.read_text() for source in sources))
    messages = re.findall(r"^\| `(.*?)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for piece in filter(None, map(str.strip, message.split("..."))):
            assert piece in code, message

"""Recipes: flat YAML files of settings, each entry with the place it was read from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tempsamp_fast.config.setting import choose_from

RECIPES = Path(__file__).parents[1] / "configs"
MOST_CHARACTERS = 1 << 16
"""Of a recipe."""
RUNS_CODE = ("allow_pickle", "trust_remote_code")
"""Settings that count only when typed on the command line."""


def runs_code(name: str, value: Any) -> bool:
    """Whether a setting of this value counts only when typed: `RUNS_CODE`, and rewards of a file."""
    return bool(value) and (name in RUNS_CODE or (name == "rewards" and ":" in str(value)))


@dataclass(frozen=True)
class Entry:
    """A value of a recipe, and where it says so: `--config mine.yaml: line 3`."""

    value: Any
    place: str


def read_recipes(names: list[str]) -> dict[str, Entry]:
    """The settings of several recipes, files or names, later ones over earlier ones."""
    return {name: entry for given in names for name, entry in read_recipe(find_recipe(given)).items()}


def find_recipe(given: str) -> Path:
    """A file, or the recipe of that name that comes with the package. Raises ValueError listing those for neither."""
    recipe = RECIPES / f"{given}.yaml"
    path = Path(given)
    if path.exists() and not path.is_dir():
        return path
    if not recipe.is_file():
        known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
        raise ValueError(f"--config {given}: no such file, and no recipe; {choose_from(given, known)}")
    return recipe


def read_recipe(path: Path, inherited_by: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """The settings of a flat YAML file, over those of the recipe that its entry `base` names, if it has one.

    A base is a file's stem in the same folder, or a recipe's name. Raises ValueError naming the file, and the line
    where there is one, for a file that cannot be read, a name that comes twice, a base that leads back to itself, and a
    setting that counts only when typed.
    """
    entries = read_entries(path, f"--config {path}")
    if always := [name for name, entry in entries.items() if runs_code(name, entry.value)]:
        raise ValueError(f"{entries[always[0]].place}: {always[0]} counts only when typed: --{always[0]}")
    if "base" not in entries:
        return entries
    found = entries.pop("base")
    base = found.value
    if Path(str(base)).name != base:
        raise ValueError(f"{found.place}: base {base!r} is no name of a recipe or of a file beside it")
    beside = path.with_name(f"{base}.yaml")
    file = beside if beside.is_file() else RECIPES / f"{base}.yaml"
    if file in (path, *inherited_by):
        raise ValueError(f"{found.place}: base {base!r} leads back to itself")
    return read_recipe(file, (path, *inherited_by)) | entries


def read_entries(path: Path, where: str) -> dict[str, Entry]:
    """The `name: value` lines of a YAML file. Raises ValueError that begins with `where`."""
    try:
        with path.open() as recipe:
            text = recipe.read(MOST_CHARACTERS)
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            is_merge = isinstance(event, yaml.ScalarEvent) and event.value == "<<"
            if depth > 2 or is_merge or isinstance(event, yaml.AliasEvent) or len(text) == MOST_CHARACTERS:
                raise ValueError(f"aliases, nesting and {MOST_CHARACTERS} characters are too much for `name: value`")
        values = yaml.safe_load(text)
        node: Any = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{where}: not valid YAML: line {line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected `name: value` lines, found {type(values).__name__}")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{where}: line {line}: {name} comes twice, as on line {lines[name]}")
        lines[name] = line
    entries = zip(lines.items(), values.values(), strict=True)
    return {name: Entry(value, f"{where}: line {line}") for (name, line), value in entries}

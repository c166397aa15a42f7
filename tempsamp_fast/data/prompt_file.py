"""Prompts of one's own: a YAML file with a template for each mode, and their copy beside the weights."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tempsamp_fast.config import MODES
from tempsamp_fast.config.recipe import Entry, read_entries
from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.data.prompts import FIELDS
from tempsamp_fast.data.text_files import shown
from tempsamp_fast.sample import Mode
from tempsamp_fast.system.files import read_json

Templates = Mapping[Mode, str]
SAVED = "prompts.json"
"""Their copy in the folder of a model, by which it is asked later."""


def read_prompt_file(path: str) -> Templates:
    """The templates of a YAML file: `answer: ...` and `think: ...`, with the fields of `prompts.FIELDS` in braces.

    Raises ValueError naming the file, the line and the flaw; `{query}` must occur.
    """
    try:
        entries = read_entries(Path(path), f"--prompt_file {path}")
    except ValueError as error:
        quoted = "; templates are quoted: answer: 'When is it that {query}?'"
        raise ValueError(f"{error}{quoted if 'not valid YAML' in str(error) else ''}") from error
    return _checked(entries, f"--prompt_file {path}")


def saved_templates(model: str) -> Templates | None:
    """Those that the model in a folder was trained with; None where it has none."""
    path = Path(model) / SAVED
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected templates by mode")
    return _checked({name: Entry(text, str(path)) for name, text in found.items()}, str(path))


def as_json(templates: Templates) -> str:
    """What `saved_templates` reads."""
    return json.dumps(dict(templates), indent=2) + "\n"


def _checked(entries: Mapping[str, Entry], where: str) -> Templates:
    for name, entry in entries.items():
        if name not in MODES:
            raise ValueError(f"{entry.place}: no mode {shown(name)}; {choose_from(name, MODES)}")
        if not isinstance(entry.value, str):
            raise ValueError(f"{entry.place}: the template of {name} is {shown(entry.value)}, expected a text")
        found = _fields(entry)
        for field in found:
            if field not in FIELDS:
                raise ValueError(f"{entry.place}: the template of {name} has no field {shown(field)}; "
                                 f"{choose_from(field, FIELDS)} (braces that are text are doubled)")  # fmt: skip
        if "query" not in found:
            raise ValueError(f"{entry.place}: the template of {name} does not ask for the {{query}}")
    if not entries:
        raise ValueError(f"{where}: no template; expected answer: and think:")
    return cast("Templates", {name: entry.value.strip() for name, entry in entries.items()})


def _fields(entry: Entry) -> list[Any]:
    """The names in braces. Attributes, conversions and formats of them are no names."""
    try:
        parts = list(string.Formatter().parse(entry.value))
    except ValueError as error:
        raise ValueError(f"{entry.place}: not a template: {error}") from error
    return [name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            for _, name, spec, conversion in parts if name is not None]  # fmt: skip

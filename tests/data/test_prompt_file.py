"""Prompts of one's own: what is asked by them, what is refused of them, and that a model is asked as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempsamp_fast.data.prompt_file import as_json, read_prompt_file, saved_templates
from tempsamp_fast.data.prompts import question

GOOD = """# mine
answer: "{query}? The video lasts {duration} s. {answer_form}."
think: |
  Think, then say when {query}
  happens: {{start}} to {{end}}.
"""


def written(folder: Path, text: str) -> str:
    path = folder / "prompts.yaml"
    path.write_text(text)
    return str(path)


def test_templates_are_filled_in(tmp_path: Path) -> None:
    templates = read_prompt_file(written(tmp_path, GOOD))
    asked = question("A dog barks. ", "answer", "grounding", "text", templates["answer"], 12.345)
    assert asked.startswith("a dog barks? The video lasts 12.3 s. Give its start and end in seconds")
    assert question("{x}", "think", "grounding", "text", templates["think"]) == (
        "Think, then say when {x}\nhappens: {start} to {end}."
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("anser: '{query}'", "line 1: no mode 'anser'; .*did you mean 'answer'"),
        ("answer: 3", "line 1: the template of answer is 3, expected a text"),
        ("# one\nanswer: When?", "line 2: the template of answer does not ask for the {query}"),
        ("answer: '{query} {qery}'", "line 1: .*no field 'qery'; .*did you mean 'query'"),
        ("answer: '{query.__class__}'", "line 1: .*no field 'query.__class__'"),
        ("answer: '{query[0]}'", r"line 1: .*no field 'query\[0\]'"),
        ("answer: '{query!r}'", "line 1: .*no field 'query!r'"),
        ("answer: '{query:>99999999}'", "line 1: .*no field 'query:>99999999'"),
        ("answer: '{query} {}'", "line 1: .*no field ''"),
        ("answer: '{query'", "line 1: not a template"),
        ("{}", "no template; expected answer: and think:"),
        ("just words", "expected `name: value` lines"),
        ("answer: [", "not valid YAML: line 1"),
        ("answer: {query}?", "not valid YAML: line 1: .*; templates are quoted: answer: '"),
        ("answer: Say: when is {query}", "not valid YAML: line 1: .*; templates are quoted"),
        ("answer: '{query}'\n  think: '{query}'", "not valid YAML: line 2"),
        ("answer: '{query}'\nanswer: '{query}?'", "line 2: answer comes twice, as on line 1"),
        ("<<: {answer: '{query}', think: '{query}'}", "not valid YAML: aliases, nesting"),
        ("answer: {query}", "line 1: the template of answer is {'query': None}, expected a text"),
        ("answer: '{query} {Duration}'", "no field 'Duration'; .*did you mean 'duration'"),
        ("answer:\n", "line 1: the template of answer is None"),
        ("answer: '  '", "does not ask for the {query}"),
        ("1: '{query}'", "line 1: no mode '1'"),
        ("", "expected `name: value` lines, found NoneType"),
    ],
)
def test_a_flaw_is_named_with_file_and_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=rf"--prompt_file .*prompts\.yaml: .*{named}"):
        read_prompt_file(written(tmp_path, text))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"--prompt_file nowhere\.yaml: No such file"):
        read_prompt_file("nowhere.yaml")


def test_their_copy_beside_the_weights_is_them(tmp_path: Path) -> None:
    templates = read_prompt_file(written(tmp_path, GOOD))
    assert saved_templates(str(tmp_path)) is None and saved_templates("someone/model") is None
    (tmp_path / "prompts.json").write_text(as_json(templates))
    assert saved_templates(str(tmp_path)) == templates


@pytest.mark.parametrize("content", [[], {"answer": "{query.__class__}"}, {"loud": "{query}"}, {"answer": 3}, {}])
def test_a_copy_by_others_is_no_more_than_templates(tmp_path: Path, content: object) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"prompts\.json: "):
        saved_templates(str(tmp_path))

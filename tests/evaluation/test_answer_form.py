"""The answer form that the command of scores is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempsamp_fast.score import main


@pytest.mark.parametrize(("form", "parse_rate", "miou"), [("json", 1, 0.75), ("text", 0, 0)])
def test_answers_are_read_in_the_form_that_is_said_and_the_first_span_of_json_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, parse_rate: float, miou: float
) -> None:
    entry = {"duration": 20, "timestamps": [[0, 10], [5, 15]], "sentences": ["one", "two"]}
    (tmp_path / "a.json").write_text(json.dumps({"v1": entry}))
    texts = "[[0, 10], [12, 20]]", "[[5, 10], [5, 15]]"
    rows = [json.dumps({"sample_id": f"v1/{number}", "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    words = ["--annotations", str(tmp_path / "a.json"), "--predictions", str(tmp_path / "p.jsonl"), "--json"]
    main([*words, "--answer_form", form])
    metrics = json.loads(capsys.readouterr().out)
    assert (metrics["parse_rate"], metrics["miou"]) == (parse_rate, miou)

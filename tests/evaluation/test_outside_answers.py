"""Answers that go on beyond the video: flagged at every door, counted in the record, and never lost to a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.batch import Completion
from tempsamp_fast.evaluation.answerer import Answerer
from tempsamp_fast.evaluation.asking import answer_row
from tempsamp_fast.infer import main
from tempsamp_fast.run.checkpoint import latest_checkpoint
from tempsamp_fast.sample import Sample

SAMPLE = Sample("s", Path("v.mp4"), "a query", 20.0, ((1.0, 3.0),))


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        *(("14.00 to 1111", True), ("14 to 20.02", True), ("25 to 30", True), ("25 to 5", True), ("1 to 1e5", False)),
        *(("14 to 20", False), ("14 to 20.004", False), ("0 to 1", False), ("soon", False)),
    ],
)
def test_an_answer_beyond_the_video_is_flagged(text: str, outside: bool) -> None:
    row = answer_row(SAMPLE, f"<answer> {text} </answer>")
    assert row["outside_video"] is outside
    json.dumps(row)


@pytest.mark.parametrize(
    ("said", "outside"),
    [("14.00 to 1" + "0" * 95, True), ("1.00 to 2.00", False), ("9.00 to 5.00", False), ("no", False)],
)
def test_inference_flags_it_and_draws_it_into_a_folder_that_is_not_there_yet(
    finished_run: Any, clips: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, said: str, outside: bool
) -> None:
    monkeypatch.setattr(
        Answerer, "answer", lambda self, prompts: [Completion(prompts[0].input_ids, f"<answer> {said} </answer>")]
    )
    model, video = latest_checkpoint(finished_run.folder)[0] / "model", next((clips / "videos").glob("*.mp4"))
    plot = tmp_path / "no/such/folder/answer.png"
    capsys.readouterr()
    assert main(["--model", str(model), "--video", str(video), "--query", "a square", "--plot", str(plot)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["outside_video"] is outside and 1000 < plot.stat().st_size < 1_000_000


def test_an_answer_whose_plot_fails_is_printed_all_the_same(
    finished_run: Any, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, video = latest_checkpoint(finished_run.folder)[0] / "model", next((clips / "videos").glob("*.mp4"))
    capsys.readouterr()
    assert main(["--model", str(model), "--video", str(video), "--query", "a", "--plot", str(tmp_path / "a.xyz")]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["query"] == "a" and output.err.startswith("error: ")


def test_the_record_counts_them(finished_run: Any) -> None:
    evaluations = [row for row in finished_run.rows if row["phase"] == "eval"]
    stages = sorted((finished_run.folder / "eval").glob("*_answer.jsonl"))
    flagged = [sum(json.loads(line)["outside_video"] for line in path.read_text().splitlines()) for path in stages]
    assert sorted(row["eval/answer/outside_video"] for row in evaluations) == sorted(flagged)

"""What the words of an evaluation change, with a double in place of the model: no checkpoint is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from tempsamp_fast.eval import fingerprint, main
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.sample import Sample
from tempsamp_fast.video import Geometry

TEXTS = {"answer": "<answer> 1 to 2 </answer> no, 5 to 6", "think": "5 to 6"}


class AnswererDouble:
    """Says the text of the mode to every query and keeps what it was made with."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    frames_of: ClassVar[list[Any]] = []

    def __init__(self, *given: Any, base: str | None = None, frames_of: Any = None) -> None:
        self.frames_of.append(frames_of)
        self.made.append(given)
        self.loader = SimpleNamespace(skipped={})

    def answer_all(self, samples: list[Sample], mode: str, batch_size: int) -> Iterator[dict[Sample, str]]:
        yield dict.fromkeys(samples, TEXTS[mode])


@pytest.fixture
def evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Path]]:
    """`evaluate(output, *words)`: what the answerer was made with, and the folder of answers and scores."""
    monkeypatch.setattr("tempsamp_fast.evaluation.answerer.Answerer", AnswererDouble)
    entry = {"duration": 10, "timestamps": [[1, 2], [5, 6], [5, 6]], "sentences": ["one", "two", "three"]}
    (tmp_path / "a.json").write_text(json.dumps({"v1": entry}))
    (tmp_path / "v1.mp4").touch()

    def run(output: str, *words: str) -> tuple[Any, Path]:
        folder = tmp_path / output
        paths = ["--model", "hub/name", "--annotations", str(tmp_path / "a.json"), "--videos", str(tmp_path)]
        assert main([*paths, "--output", str(folder), *words]) == 0
        return AnswererDouble.made[-1], folder

    return run


def scores(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scores.json").read_text())["rows"]


def spans(folder: Path, mode: str) -> list[Any]:
    return [json.loads(line)["span"] for line in (folder / f"{mode}.jsonl").read_text().splitlines()]


def test_answers_are_greedy_and_long_unless_told_otherwise(evaluate) -> None:
    (_, data, params, seed), _ = evaluate("plain")
    assert (params, seed) == (SamplingParams(0.0, 1.0, 0, 2048), 0) and data.on_bad_sample == "raise"
    words = ("--temperature", "0.5", "--top_p", "0.9", "--top_k", "7", "--max_completion_length", "9", "--seed", "3")
    (_, data, params, seed), folder = evaluate("other", *words, "--max_frames", "6", "--skip_bad_videos")
    assert (params, seed) == (SamplingParams(0.5, 0.9, 7, 9), 3)
    assert (data.max_frames, data.on_bad_sample) == (6, "skip")
    kept = json.loads((folder / "settings.json").read_text())
    assert (kept["top_p"], kept["top_k"], kept["max_frames"], kept["seed"]) == (0.9, 7, 6, 3)


def test_untagged_answers_count_in_rows_and_scores_where_they_are_asked_for(evaluate) -> None:
    _, tagged = evaluate("tagged", "--mode", "think")
    assert spans(tagged, "think") == [None] * 3 and scores(tagged)[0]["parse_rate"] == 0
    _, untagged = evaluate("untagged", "--mode", "think", "--untagged")
    assert spans(untagged, "think") == [[5.0, 6.0]] * 3
    assert (scores(untagged)[0]["miou"], scores(untagged)[0]["parse_rate"]) == (pytest.approx(2 / 3), 1)


def test_the_mixed_row_takes_the_better_mode_and_parses_where_any_does(
    evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = evaluate("both", "--mode", "answer+think", "--mixed_cot", "--untagged")
    assert [row["miou"] for row in scores(folder)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    _, tagged = evaluate("tagged", "--mode", "think+answer", "--mixed_cot", "--max_samples", "2")
    assert [row["parse_rate"] for row in scores(tagged)] == [0, 1, 1] and len(spans(tagged, "think")) == 2
    monkeypatch.setitem(TEXTS, "answer", "no idea")
    monkeypatch.setitem(TEXTS, "think", "no idea")
    _, silent = evaluate("silent", "--mode", "answer+think", "--mixed_cot")
    assert [row["parse_rate"] for row in scores(silent)] == [0, 0, 0]


def test_checkpoints_of_the_same_shape_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before != fingerprint("hub/name")
    for place in (0, 100_000, 299_000):  # a file of many bytes is looked at in stretches of 4096, 64 of them
        content = bytearray(300_000)
        content[place] = 1
        file.write_bytes(content)
        assert fingerprint(str(tmp_path)) != before


def test_answers_of_weights_that_were_overwritten_are_not_gone_on_with(evaluate, tmp_path: Path, capsys) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for content in (bytes(9999), bytes(9999), b"\1" * 9999):
        (model / "model.safetensors").write_bytes(content)
        if content == bytes(9999):
            evaluate("out", "--model", str(model))
    with pytest.raises(AssertionError):
        evaluate("out", "--model", str(model))
    assert "began with model " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("fps", 3.0), ("min_frames", 6), ("max_frames", 10), ("sampling", "hf_qwen3")),
        *(("min_pixels", 2000), ("max_pixels", 9000), ("total_pixels", 50_000)),
    ],
)
def test_frames_are_taken_as_typed_and_answers_to_others_are_not_gone_on_with(
    evaluate, capsys, name: str, value: Any
) -> None:
    evaluate("out")
    (_, data, _, _), _ = evaluate("other", f"--{name}", str(value))
    assert getattr(data, name) == value
    with pytest.raises(AssertionError):
        evaluate("out", f"--{name}", str(value))
    assert f"began with {name} " in capsys.readouterr().err


def test_a_protocol_sets_what_is_asked_shown_read_and_counted(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are in the patches of the model; what is typed counts in their place."""
    monkeypatch.setitem(TEXTS, "answer", "from 0.6 - 2.4, or 5 to 6")
    (_, data, params, _), folder = evaluate("timelens", "--protocol", "timelens", "--fps", "1")
    assert (data.answer_form, data.task, params.max_completion_length) == ("sentence", "grounding", 512)
    frames = AnswererDouble.frames_of[-1](Geometry())
    assert frames | {"fps": 1, "min_pixels": 64 * 28 * 28, "total_pixels": 14_336 * 28 * 28} == frames
    assert AnswererDouble.frames_of[-1](Geometry.of_family("qwen3_vl"))["total_pixels"] == 2 * 14_336 * 32 * 32
    assert spans(folder, "answer") == [[1.0, 2.0]] * 3
    (row,) = scores(folder)
    assert (row["protocol"], row["miou"]) == ("timelens", pytest.approx(1 / 3))
    assert json.loads((folder / "scores.json").read_text())["protocol"] == "timelens"
    kept = json.loads((folder / "settings.json").read_text())
    assert (kept["protocol"], kept["answer_form"], "14336 tokens in all" in kept["budget"]) == (
        "timelens",
        "sentence",
        True,
    )


def test_a_protocol_and_what_it_sets_itself_do_not_go_together(evaluate, tmp_path: Path, capsys) -> None:
    for words in (["--untagged"], ["--task", "highlight"]):
        with pytest.raises(AssertionError):
            evaluate("out", "--protocol", "orarl", *words)
        assert "says itself what is asked and read" in capsys.readouterr().err


def test_every_span_counts_where_the_protocol_asks_for_all(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, "answer", "<time>1 - 2 seconds</time> <time>5 - 6 seconds</time>")
    _, folder = evaluate("omtg", "--protocol", "omtg")
    (row,) = scores(folder)
    assert AnswererDouble.frames_of[-1] is None and (row["c_acc"], row["tiou"], row["etf1"]) == (0, 0.5, 0)
    assert json.loads((folder / "answer.jsonl").read_text().splitlines()[0])["spans"] == [[1.0, 2.0], [5.0, 6.0]]


@pytest.mark.parametrize(("name", "miou"), [("charades-timelens.json", 1), ("mine.json", 0.5)])
def test_a_protocol_counts_as_it_says_of_the_data_set(
    evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, miou: float
) -> None:
    monkeypatch.setitem(TEXTS, "answer", "[[1, 2], [5, 6]]")
    (tmp_path / name).write_text(json.dumps({"v1": {"duration": 10, "queries": ["one"], "spans": [[1, 2]]}}))
    _, folder = evaluate("out", "--protocol", "timelens2", "--annotations", str(tmp_path / name))
    assert scores(folder)[0]["miou"] == pytest.approx(miou)


def test_answers_beyond_the_video_are_counted(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The video lasts 10 s, and three queries are about it."""
    monkeypatch.setitem(TEXTS, "answer", "<answer> 8 to 14 </answer>")
    _, folder = evaluate("out", "--mode", "answer+think", "--untagged")
    assert [row["outside_video"] for row in scores(folder)] == [3, 0]

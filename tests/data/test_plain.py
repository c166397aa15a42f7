"""Rows of one's own: video, query, start, end; durations are read from the videos, thoughts go before the answer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.annotations import load_annotations, read_annotations
from tempsamp_fast.data.catalogue import load_samples, load_training_data
from tempsamp_fast.data.formats import FORMATS
from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.run.resume import samples_digest
from tempsamp_fast.score import main as score_main


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"video": "a", "query": "it falls", "start": 1.0, "end": 2.5, "duration": 9.0, **changes}


def test_rows_are_read_and_told_by_their_keys(tmp_path: Path) -> None:
    several = {"video": "b.mkv", "query": "q", "windows": [[0, 1], [2, 3]], "duration": 4, "id": 7, "difficulty": 0.5}
    path = write(tmp_path / "mine.jsonl", row(), several)
    first, second = load_annotations(path)
    assert (first.sample_id, first.video, first.query, first.duration_s) == ("a/1", Path("a.mp4"), "it falls", 9.0)
    assert first.windows == ((1.0, 2.5),) and first.reasoning is None
    assert (second.sample_id, second.windows, second.difficulty) == ("7", ((0.0, 1.0), (2.0, 3.0)), 0.5)
    assert load_samples(str(path), tmp_path, "plain") == load_annotations(path, tmp_path)
    with pytest.raises(ValueError, match="no field 'vid'"):
        load_samples(str(path), tmp_path, "qvhighlights")
    with pytest.raises(ValueError, match=r"format 'plane': choose from auto, .*; did you mean 'plain'"):
        load_samples(str(path), tmp_path, "plane")


def test_two_ways_to_tell_a_span_must_agree(tmp_path: Path) -> None:
    (both,) = load_annotations(write(tmp_path / "a.jsonl", row(windows=[[1.0, 2.5]])))
    assert both.windows == ((1.0, 2.5),)
    with pytest.raises(ValueError, match="line 1, video 'a': windows and start and end tell different spans"):
        load_annotations(write(tmp_path / "b.jsonl", row(windows=[[1.0, 3.5]])))


@pytest.mark.parametrize("fields", [{"span": [1, 2]}, {"caption": "q", "timestamp": [1, 2]}, {"timestamps": [[1, 2]]}])
def test_rows_of_an_unknown_form_are_told_the_plain_one(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", {"video": "a", **fields})
    with pytest.raises(ValueError, match=r"line 1: of no form .*\['video', .*JSON lines with video, query"):
        load_annotations(path)
    table = tmp_path / "a.csv"
    table.write_text("video,start,end\n")
    with pytest.raises(ValueError, match=r"a\.csv: of tables .* are read; rows of one's own"):
        load_annotations(table)
    with pytest.raises(ValueError, match="is a folder, and a file is expected"):
        load_annotations(tmp_path)


def test_the_setting_names_every_format() -> None:
    (format,) = [field for field in dataclasses.fields(DataConfig) if field.name == "format"]
    assert all(f" {name}" in format.metadata["help"] for name in FORMATS)


def test_the_duration_is_that_of_the_file(clips: Path, tmp_path: Path) -> None:
    truth = load_annotations(clips / "annotations/train.json", clips / "videos")
    rows = [
        {"video": each.video.name, "query": each.query, "start": each.windows[0][0], "end": each.windows[0][1]}
        for each in truth
    ]
    found = load_annotations(write(tmp_path / "mine.jsonl", *rows), clips / "videos")
    assert [each.video for each in found] == [each.video for each in truth]
    assert all(abs(a.duration_s - b.duration_s) < 0.2 for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"start": "soon"}, "line 1, video 'a': window .* has 'soon'"),
        (
            {"video": "/elsewhere/a.mp4"},
            "line 1, video '/elsewhere/a.mp4': .* is not a path inside",
        ),
        ({"reasoning": ""}, "line 1, video 'a': reasoning is empty"),
        ({"reasoning": ["x"]}, "line 1, video 'a': reasoning is"),
        ({"reasoning": "so </think> <answer>"}, "line 1, video 'a': reasoning holds '</think'"),
        ({"reasoning": "so<|im_end|>"}, r"line 1, video 'a': reasoning holds '<\|im_end'"),
        ({"reasoning": "so <|object_ref_start|>it"}, r"line 1, video 'a': reasoning holds '<\|object_ref_start'"),
        ({"reasoning": "<tool_call>"}, "line 1, video 'a': reasoning holds '<tool_call'"),
        ({"id": [1]}, "line 1, video 'a': id is"),
        ({"duration": None}, "line 1, video 'a': duration has None"),
        ({"video": "../a"}, "line 1.*not a path inside"),
    ],
)
def test_a_flaw_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=rf"mine\.jsonl: {named}"):
        load_annotations(write(tmp_path / "mine.jsonl", row(**change)), tmp_path)


@pytest.mark.parametrize("name", ["start", "end", "query", "video"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    given = {key: value for key, value in row().items() if key != name}
    with pytest.raises(ValueError, match=f"line 1.*no field '{name}'"):
        load_annotations(write(tmp_path / "mine.jsonl", given), format="plain")


def test_a_video_without_a_duration_must_be_there_and_readable(tmp_path: Path, capsys) -> None:
    given = {"video": "a", "query": "q", "start": 0, "end": 1}
    path = write(tmp_path / "mine.jsonl", given)
    with pytest.raises(ValueError, match=r"mine\.jsonl: line 1, video 'a': no duration is given.* not in"):
        load_annotations(path, tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"line 1, video 'a': no duration .* cannot be read: .*a\.mp4"):
        load_annotations(path, tmp_path)
    with pytest.raises(SystemExit):
        score_main(["--predictions", "p.jsonl", "--annotations", str(path)])
    assert "no duration is given, and the video is not looked for (--videos)" in capsys.readouterr().err
    (kept,) = load_annotations(path, tmp_path, skips_bad=True)
    assert kept.video == tmp_path / "a.mp4" and kept.duration_s == 1
    flawed = [{"query": ""}, {"windows": [[2, 1]]}, {"windows": []}, {"windows": [[0, 0]]}]
    rows = [given, *({"video": "a", "query": "q", "id": str(index), **each} for index, each in enumerate(flawed))]
    for each in rows[1:]:
        each |= {} if "windows" in each else {"start": 0, "end": 1}
    annotations = read_annotations(write(tmp_path / "flawed.jsonl", *rows), tmp_path)
    assert len(annotations.samples) == 1 and len(annotations.dropped) == 4 and list(annotations.untimed) == [kept.video]
    for windows in ([5], [[1]], [[1, None]], [["1", "2"]]):
        with pytest.raises(ValueError, match=r"line 1, video 'a': (window|start|end)"):
            load_annotations(write(tmp_path / "b.jsonl", {"video": "a", "query": "q", "windows": windows}), tmp_path)
    several = write(tmp_path / "more.jsonl", *({**given, "video": name} for name in "abbcdef"))
    with pytest.raises(ValueError, match=r"line 1, video 'a'.*; and so for 5 more videos \(data check lists them\)$"):
        load_annotations(several, tmp_path)


def test_a_thought_goes_before_the_answer_in_think_mode_alone(tmp_path: Path) -> None:
    (sample,) = load_annotations(write(tmp_path / "mine.jsonl", row(reasoning=" It tips at 1 s. ")))
    assert off_policy_text(sample, "think") == "<think> It tips at 1 s. </think> <answer> 1.00 to 2.50 </answer>"
    for mode, style in (("answer", "template"), ("think", "answer_only")):
        assert off_policy_text(sample, mode, style) == "<answer> 1.00 to 2.50 </answer>"
    without = dataclasses.replace(sample, reasoning=None)
    assert "<timestep>" in (off_policy_text(without, "think") or "")
    assert samples_digest([sample]) != samples_digest([without])


def test_crops_are_refused_with_thoughts(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", row(reasoning="It tips."))
    settings = DataConfig(annotations=str(path), videos=str(tmp_path), random_crop=0.5)
    with pytest.raises(ValueError, match=r"random_crop=0\.5: must be 0 with reasoning"):
        load_training_data(settings)
    assert load_training_data(dataclasses.replace(settings, random_crop=0.0))[0][0].reasoning == "It tips."

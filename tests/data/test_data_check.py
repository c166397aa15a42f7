"""`data check`: a video that is missing, unreadable or of another length is named, and nothing else is."""

import json
import subprocess

import pytest

from tempsamp_fast.data.__main__ import check, main
from tempsamp_fast.data.annotations import read_annotations
from tempsamp_fast.data.catalogue import DATASETS, Dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos: `good` and `long` of 3 s, `cut` without its end, `text` that is none; `gone` is annotated only."""
    videos = tmp_path_factory.mktemp("data") / "videos"
    videos.mkdir()
    source = ["-f", "lavfi", "-i", "testsrc2=duration=3:size=64x48:rate=10"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", str(videos / "good.mp4")], check=True)
    content = (videos / "good.mp4").read_bytes()
    (videos / "long.mp4").write_bytes(content)
    (videos / "cut.mp4").write_bytes(content[: len(content) // 2])
    (videos / "text.mp4").write_text("not a video")
    durations = {"good": 3.1, "long": 9.0, "cut": 3.0, "text": 3.0, "gone": 3.0}
    entries = {
        name: {"duration": duration, "timestamps": [[0.5, 3.5]], "sentences": ["a query"]}
        for name, duration in durations.items()
    }
    (videos.parent / "charades_test.json").write_text(json.dumps(entries))
    return videos


def test_each_kind_of_problem_names_its_video(folder):
    annotations = read_annotations(folder.parent / "charades_test.json", folder)
    findings = check(annotations, Dataset((), num_videos=5, num_queries=6))
    assert (findings.num_videos, findings.num_queries, findings.num_late_ends) == (5, 5, 4)
    assert findings.problems["counts"] == ["5 queries, published are 6"]
    assert findings.problems["missing"] == [str(folder / "gone.mp4")]
    assert [line.split(":")[0] for line in findings.problems["unreadable"]] == [
        str(folder / "cut.mp4"),
        str(folder / "text.mp4"),
    ]
    assert findings.problems["inconsistent"] == [f"{folder / 'long.mp4'}: lasts 3.00 s, annotated are 9.00 s"]


def test_command_line_finds_the_annotations_and_exits_with_1_on_problems(folder, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["check", "charades-test", "--videos", str(folder), "--show", "1"])
    printed = capsys.readouterr().out
    assert "5 videos, published are 1334" in printed and "unreadable: 2" in printed and "and 1 more" in printed


def test_videos_whose_length_nothing_tells_are_listed_beside_all_else(folder, tmp_path, capsys):
    rows = [{"video": name, "query": "a query", "windows": [[0.5, 1.5]]} for name in ("good", "text", "text", "gone")]
    rows.append({**rows[0], "video": "long", "duration": 9.0})
    annotations = tmp_path / "mine.jsonl"
    annotations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="1"):
        main(["check", str(annotations), "--videos", str(folder)])
    printed = capsys.readouterr().out
    assert "without a duration: 2" in printed and "inconsistent: 1" in printed
    assert printed.startswith("4 videos, 5 queries\n") and f"missing: 1\n  {folder / 'gone.mp4'}\n" in printed
    assert "line 2, video 'text': no duration" in printed and "line 4, video 'gone': no duration" in printed


@pytest.mark.parametrize("durations", [(9.0, 3.1), (3.1, 9.0)])
def test_a_wrong_duration_is_found_in_any_row_of_a_video(folder, tmp_path, capsys, durations):
    row = {"video": "good", "query": "a query", "windows": [[0.5, 1.5]]}
    rows = [json.dumps({**row, "duration": duration, "id": str(duration)}) for duration in durations]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(SystemExit, match="1"):
        main(["check", str(tmp_path / "a.jsonl"), "--videos", str(folder), "--show", "-1"])
    printed = capsys.readouterr().out
    assert printed.endswith("inconsistent: 1\n  and 1 more (--show)\n")


def test_command_line_exits_with_0_when_all_is_well(folder, tmp_path, monkeypatch, capsys):
    annotations = tmp_path / "a.json"
    entry = {"duration": 3.0, "timestamps": [[0.5, 2.5]], "sentences": ["a query"]}
    annotations.write_text(json.dumps({"good": entry}))
    monkeypatch.setitem(DATASETS, "charades-test", Dataset((), 1, 1))
    with pytest.raises(SystemExit, match="0"):
        main(["check", "charades-test", "--videos", str(folder), "--annotations", str(annotations)])
    assert "missing: ok" in capsys.readouterr().out


def test_dropped_queries_are_listed_and_counted_but_no_problem(folder, tmp_path, monkeypatch, capsys):
    annotations = tmp_path / "a.json"
    entry = {"duration": 3.0, "timestamps": [[0.5, 2.5], [3.0, 4.0], [2.0, 1.0]], "sentences": ["a", "b", "c"]}
    annotations.write_text(json.dumps({"good": entry}))
    monkeypatch.setitem(DATASETS, "charades-test", Dataset((), 1, 3))
    with pytest.raises(SystemExit, match="0"):
        main(["check", "charades-test", "--videos", str(folder), "--annotations", str(annotations), "--show", "1"])
    printed = capsys.readouterr().out
    assert "1 videos, 3 queries" in printed and "counts: ok" in printed and "dropped: 2" in printed
    assert f"{annotations}: video 'good', query 1: window [3.0, 4.0] starts at or beyond the duration 3.0" in printed
    assert "and 1 more" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["qvhighlights-val", "--videos", "{}"], "no qvhighlights_val.jsonl or highlight_val_release.jsonl in"),
        (["charades-test", "--videos", "{}/nowhere"], "nowhere: no such folder"),
        (["charades", "--videos", "{}"], "'charades': no such file, and no data set of charades-train"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(folder, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["check", *(word.format(folder) for word in arguments)])
    assert message in capsys.readouterr().err

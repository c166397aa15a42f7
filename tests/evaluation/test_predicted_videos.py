"""Which video a prediction is of, by as much of its path as the prediction names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tempsamp_fast.evaluation.scoring import read_predictions
from tempsamp_fast.sample import Sample
from tempsamp_fast.score import main

VIDEOS = ("cam1/001.mp4", "cam2/001.mkv", "002.mp4", "clip_1.5_9.0.mp4")
SAMPLES = [
    Sample(str(index), Path("videos") / name, "A door.", 9.0, ((0.0, 1.0),)) for index, name in enumerate(VIDEOS)
]


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[float]]:
    """The starts of the samples' spans, where rows predict one second from their index on."""

    def starts(*vids: str) -> list[float]:
        rows = [{"vid": vid, "query": "a door", "span": [index, index + 1]} for index, vid in enumerate(vids)]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [row["span"][0] for row in read_predictions(tmp_path / "p.jsonl", SAMPLES)]

    return starts


def test_a_name_a_path_or_its_end_tell_the_video(read: Callable[..., list[float]]) -> None:
    assert read("cam2/001", "002", "cam1/001.mp4", "clip_1.5_9.0") == [2, 0, 1, 3]
    assert read("002.mp4", "001.mp4", "videos/cam2/001.mkv", "clip_1.5_9.0.mp4") == [1, 2, 0, 3]


@pytest.mark.parametrize(("vid", "is_it"), [("002", 1), ("002.mp4", 1), ("002.mkv", 1), ("v/002.mp4", 1), ("03", 0)])
def test_of_a_file_that_is_not_here_ending_and_folder_are_not_known(tmp_path: Path, vid: str, is_it: int) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"vid": vid, "query": "a door", "span": [0, 1]}))
    sample = dataclasses.replace(SAMPLES[2], video=Path("002.mp4"))
    if is_it:
        assert len(read_predictions(tmp_path / "p.jsonl", [sample])) == 1
    else:
        with pytest.raises(ValueError, match="is not in the annotations"):
            read_predictions(tmp_path / "p.jsonl", [sample])


def test_of_a_file_that_is_here_both_are(tmp_path: Path) -> None:
    (tmp_path / "002.mp4").touch()
    sample = dataclasses.replace(SAMPLES[2], video=tmp_path / "002.mp4")
    for vid, is_it in (("002.MP4", True), (str(sample.video), True), ("002.mkv", False), ("v/002.mp4", False)):
        (tmp_path / "p.jsonl").write_text(json.dumps({"vid": vid, "query": "a door", "span": [0, 1]}))
        if is_it:
            assert len(read_predictions(tmp_path / "p.jsonl", [sample])) == 1
            continue
        with pytest.raises(ValueError, match="is not in the annotations"):
            read_predictions(tmp_path / "p.jsonl", [sample])


@pytest.mark.parametrize(
    ("vid", "told"),
    [
        ("001", r"line 1: vid '001' is of 2 videos: videos/cam1/001.mp4, videos/cam2/001.mkv; name its folder too"),
        ("cam3/001", "line 1: vid 'cam3/001' with query 'a door' is not in the annotations"),
        ("003.avi", "line 1: vid '003.avi' with query 'a door' is not in the annotations"),
        ("", "line 1: vid '' with query 'a door' is not in the annotations"),
    ],
)
def test_what_is_of_no_video_or_of_several_is_refused(read: Callable[..., list[float]], vid: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read(vid)


def test_answers_in_another_form_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"video": "a", "query": "q", "start": 0, "end": 1, "duration": 9}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "p.jsonl").write_text(json.dumps({"vid": "a", "query": "q", "text": "0.0 to 1.0"}))
    words = ["--annotations", str(tmp_path / "a.jsonl"), "--predictions", str(tmp_path / "p.jsonl"), "--json"]
    main(words)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["miou"] == 0
    assert printed.err.startswith("warning: no answer could be read") and "--untagged" in printed.err
    main([*words, "--untagged"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["miou"] == 1 and not printed.err

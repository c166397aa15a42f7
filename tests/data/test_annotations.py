"""Annotation files: every published form loads, every flaw is named with its place."""

import json
import logging
import os
from pathlib import Path

import pytest

from tempsamp_fast.data.annotations import find_video, load_annotations, read_annotations

SHARED = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[3] / "shared/data")) / "annotations"


def captions(**changes):
    return {"AB1": {"duration": 33.75, "timestamps": [[0.0, 6.9]], "sentences": ["a person sits."], **changes}}


def qv_row(**changes):
    row = {"qid": 7, "query": "a dog runs", "duration": 10, "vid": "x_0.0_10.0", "relevant_windows": [[2, 6]]}
    return {**row, "relevant_clip_ids": [1, 2], "saliency_scores": [[1, 2, 3], [0, 0, 4]], **changes}


def timelens_row(**changes):
    row = {"problem": "a cat jumps", "answer": "<answer> 98.0 to 103.0 </answer>", "videos": ["cats/c1.mp4"]}
    return {**row, "duration": 120.5, "difficulty": 0.4, **changes}


@pytest.fixture
def written(tmp_path):
    """Write a content under a file name; JSON unless it is text already."""

    def write(name, content):
        if not isinstance(content, str):
            rows = content if isinstance(content, list) else [content]
            content = "\n".join(json.dumps(row) for row in rows)
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real annotations: no folder {SHARED}; set TEMPSAMP_SHARED")
@pytest.mark.parametrize(
    "name, num_videos, num_queries",
    [
        ("charades_test.json", 1334, 3720),
        ("activitynet_val_2.json", 4885, 17031),
        ("qvhighlights_val.jsonl", 1519, 1550),
    ],
)
def test_real_files_load_with_the_published_counts(name, num_videos, num_queries):
    samples = load_annotations(SHARED / name)
    assert len({sample.sample_id for sample in samples}) == len(samples) == num_queries
    assert len({sample.video_id for sample in samples}) == num_videos


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real annotations: no folder {SHARED}; set TEMPSAMP_SHARED")
def test_late_ends_of_the_real_charades_file_are_counted_once_and_kept(caplog):
    samples = load_annotations(SHARED / "charades_test.json")
    assert [record.message.split(": ")[-1] for record in caplog.records] == [
        "562 of 3720 windows end beyond their video; kept as they are"
    ]
    assert any(sample.windows[0][1] > sample.duration_s for sample in samples)


@pytest.mark.parametrize("key", ["duration", "video_duration"])
def test_captions_json(written, key):
    entry = captions()["AB1"]
    entry[key] = entry.pop("duration")
    (sample,) = load_annotations(written("a.json", {"AB1": {**entry, "phrases": []}}), videos="clips")
    assert sample.video == Path("clips/AB1.mp4")
    assert (sample.query, sample.duration_s, sample.windows) == ("a person sits.", 33.75, ((0.0, 6.9),))


def test_charades_text_takes_durations_from_the_table_beside_it(written):
    written("Charades_v1_test.csv", "id,subject,length\nAB1,x,30.96\n")
    (sample,) = load_annotations(written("sta_test.txt", "AB1 24.3 30.4##person turns a light on.\n"))
    assert (sample.video_id, sample.duration_s, sample.windows) == ("AB1", 30.96, ((24.3, 30.4),))
    assert sample.query == "person turns a light on."


def test_charades_text_without_durations_says_what_is_missing(written):
    with pytest.raises(ValueError, match=r"Charades_v1_train\.csv"):
        load_annotations(written("sta_test.txt", "AB1 24.3 30.4##person turns a light on.\n"))


def test_qvhighlights_keeps_several_windows_and_every_annotator(written):
    (sample,) = load_annotations(written("a.jsonl", qv_row(relevant_windows=[[2, 4], [6, 8]])))
    assert sample.sample_id == "7" and sample.video_id == "x_0.0_10.0"
    assert sample.windows == ((2.0, 4.0), (6.0, 8.0))
    assert sample.clip_scores == {1: (1, 2, 3), 2: (0, 0, 4)}


def test_timelens_rows(written):
    (sample,) = load_annotations(written("a.jsonl", timelens_row()), videos="clips")
    assert (sample.video, sample.windows, sample.difficulty) == (Path("clips/cats/c1.mp4"), ((98.0, 103.0),), 0.4)


def test_timelens_100k_rows_hold_several_events(written):
    """And a video may come in several rows: ids tell them apart."""
    events = [{"query": "one", "span": [[1, 2]]}, {"query": "two", "span": [[3, 4.5], [6, 7]]}]
    row = {"video_path": "didemo/a.mp4", "duration": 20, "source": "didemo", "events": events}
    samples = load_annotations(written("a.jsonl", [row, {**row, "events": events[:1]}]), videos="clips")
    assert [(s.sample_id, s.query, s.windows) for s in samples] == [
        ("didemo/a.mp4/1/0", "one", ((1.0, 2.0),)),
        ("didemo/a.mp4/1/1", "two", ((3.0, 4.5), (6.0, 7.0))),
        ("didemo/a.mp4/2/0", "one", ((1.0, 2.0),)),
    ]
    assert {sample.video for sample in samples} == {Path("clips/didemo/a.mp4")}


def test_an_id_that_comes_twice_is_an_error_naming_its_place(written):
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2, video 'x_0\.0_10\.0': a sample of id '7' came before"):
        load_annotations(written("a.jsonl", [qv_row(), qv_row()]))


def test_timelens_bench(written):
    content = {"v1": {"duration": 20, "queries": ["one", "two"], "spans": [[1, 2], [3, 4.5]]}}
    samples = load_annotations(written("a.json", content))
    assert [(s.sample_id, s.query, s.windows) for s in samples] == [
        ("v1/0", "one", ((1.0, 2.0),)),
        ("v1/1", "two", ((3.0, 4.5),)),
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timestamps": [[0, float("nan")]]}, "has nan, expected a finite number"),
        ({"timestamps": [[0, "6.9"]]}, "has '6.9', expected a finite number"),
        ({"timestamps": [[0, True]]}, "has True, expected a finite number"),
        ({"timestamps": [[1, 2, 3]]}, r"\[1, 2, 3\] is not a pair"),
        ({"timestamps": {}}, r"timestamps is {}, expected a list"),
        ({"timestamps": []}, "1 sentences but 0 timestamps"),
        ({"duration": None}, "duration has None"),
        ({"sentences": [3]}, "query is 3, expected a str"),
    ],
)
def test_a_flaw_is_an_error_naming_file_video_and_value(written, changes, message):
    path = written("flawed.json", captions(**changes))
    with pytest.raises(ValueError, match=rf"flawed\.json: video 'AB1'.*{message}"):
        load_annotations(path)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"timestamps": [[6.9, 6.9]]}, "window [6.9, 6.9] does not end after its start"),
        ({"timestamps": [[33.75, 40.0]]}, "window [33.75, 40.0] starts at or beyond the duration 33.75"),
        ({"timestamps": [[-1, 4]]}, "window [-1, 4] starts before 0"),
        ({"duration": 0}, "duration 0.0 is not positive"),
        ({"sentences": [" . "]}, "query ' . ' is empty"),
    ],
)
def test_an_unusable_query_is_dropped_with_its_reason_and_logged_once(written, caplog, changes, reason):
    path = written("a.json", {**captions(**changes), "AB2": captions()["AB1"], "AB3": captions(**changes)["AB1"]})
    annotations = read_annotations(path)
    assert [sample.video_id for sample in annotations.samples] == ["AB2"]
    assert annotations.dropped == [f"{path}: video '{name}', query 0: {reason}" for name in ("AB1", "AB3")]
    assert not caplog.records
    assert [sample.video_id for sample in load_annotations(path)] == ["AB2"]
    assert [record.message for record in caplog.records] == [
        f"{path}: dropped 2 of 3 queries, the first: {annotations.dropped[0]}"
    ]


@pytest.mark.parametrize(
    "rows, reason",
    [
        ([qv_row(), qv_row(qid=8, relevant_windows=[])], "no true window"),
        ([qv_row(), qv_row(qid=8, relevant_windows=[[2, 6], [10, 12]])], "[10, 12] starts at or beyond the duration"),
        ([timelens_row(), timelens_row(answer="soon")], "no true window"),
        ([timelens_row(), timelens_row(answer="<answer> 9 to 8 </answer>")], "does not end after its start"),
    ],
)
def test_rows_without_a_valid_span_are_dropped(written, rows, reason):
    annotations = read_annotations(written("a.jsonl", rows))
    assert len(annotations.samples) == 1
    (dropped,) = annotations.dropped
    assert "a.jsonl: line 2, video" in dropped and reason in dropped


def test_a_charades_line_beyond_the_video_is_dropped_and_the_other_ids_stay(written):
    written("Charades_v1_test.csv", "id,length\nAB1,30\n")
    lines = ["AB1 1 2##one", "AB1 30.1 31##two", "AB1 3 4##three"]
    samples = load_annotations(written("a.txt", "\n".join(lines)))
    assert [sample.sample_id for sample in samples] == ["AB1/1", "AB1/3"]


def test_a_file_of_which_nothing_is_left_is_an_error_with_the_first_reason(written):
    with pytest.raises(ValueError, match=r"a\.json: no annotated query.*dropped 1, .*video 'AB1'.*starts before 0"):
        load_annotations(written("a.json", captions(timestamps=[[-1, 4]])))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"relevant_clip_ids": [1]}, "1 relevant_clip_ids but 2 saliency_scores"),
        ({"relevant_clip_ids": [1, 5]}, "relevant_clip_ids has 5"),
        ({"saliency_scores": [[1], [5]]}, r"saliency_scores has \[5\]"),
        ({"saliency_scores": [[1], []]}, r"saliency_scores has \[\]"),
        ({"vid": 3}, "vid is 3, expected a str"),
    ],
)
def test_a_flawed_highlight_row_is_an_error_naming_the_line(written, changes, message):
    path = written("flawed.jsonl", [qv_row(), qv_row(qid=8, **changes)])
    with pytest.raises(ValueError, match=rf"flawed\.jsonl: line 2.*{message}"):
        load_annotations(path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", '{"AB1": ', r"a\.json: malformed JSON"),
        ("a.json", "[]", r"a\.json: no annotated query in it"),
        ("a.json", '{"AB1": {}}', r"video 'AB1': no field 'sentences'"),
        ("a.json", "{}", "no annotated query"),
        ("a.jsonl", '{"qid": 1}\n{', r"line 1: no field 'vid'"),
        ("a.jsonl", json.dumps(timelens_row(videos=[])), r"videos is \[\]"),
        ("a.txt", "AB1 1 2 a person", "is not `VIDEO start end##sentence`"),
    ],
)
def test_a_malformed_file_is_an_error_naming_it(written, name, text, message):
    written("Charades_v1_test.csv", "id,length\nAB1,30\n")
    with pytest.raises(ValueError, match=message):
        load_annotations(written(name, text))


def test_unknown_format_lists_the_choices(written):
    with pytest.raises(ValueError, match="format 'coco': choose from auto, captions"):
        load_annotations(written("a.json", captions()), format="coco")


def test_late_end_is_kept_and_logged_once(written, caplog):
    with caplog.at_level(logging.WARNING):
        (sample,) = load_annotations(written("a.json", captions(timestamps=[[1.0, 40.0]])))
    assert sample.windows == ((1.0, 40.0),)
    assert [record.message.split(": ")[-1] for record in caplog.records] == [
        "1 of 1 windows end beyond their video; kept as they are"
    ]


@pytest.mark.parametrize(
    ("video_id", "name"),
    [
        *(("a", "a.mkv"), ("b", "b.webm"), ("c", "c.avi"), ("d", "d.mp4"), ("e", "e.mov"), ("f", "f.m4v")),
        *(("g", "g.MP4"), ("h", "h.MOV"), ("i", "i.M4v"), ("j", "j.WebM"), ("sub/k", "k.AVI")),
        *(("x_0.0_2.0", "x_0.0_2.0.MKV"), ("frames", "frames"), ("l", "l.3gp"), ("m.wmv", "m.WMV"), ("n", "n.Mpg")),
        *((name, "u\u0308.MP4") for name in ("\u00fc", "u\u0308", "u\u0308.mp4", "\u00fc.mp4", "\u00fc.MP4")),
        *(("d.mp4", "d.mp4"), ("g.mp4", "g.MP4"), ("d.MP4", "d.mp4"), ("both", "both.mp4"), ("both.MP4", "both.MP4")),
        *(("A", None), ("t", None), ("nothing", None), ("sub/nothing/k", None), ("a" * 300, None)),
    ],
)  # fmt: skip
def test_a_video_is_found_by_its_id_whatever_the_case_of_its_suffix(tmp_path, video_id, name):
    """Ids themselves keep their case: those of YouTube differ by it alone."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "frames").mkdir()
    for file in ("a.mkv", "b.webm", "c.avi", "d.mp4", "e.mov", "f.m4v", "g.MP4", "h.MOV", "i.M4v", "j.WebM", "t.txt",
                 "sub/k.AVI", "x_0.0_2.0.MKV", "both.mp4", "both.MP4", "both.avi", "l.3gp", "m.WMV", "n.Mpg",
                 "u\u0308.MP4"):  # fmt: skip
        (tmp_path / file).touch()
    found = find_video(tmp_path, video_id)
    assert (found and found.name) == name and (found is None or found.exists())


@pytest.mark.parametrize("video_id", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_paths_cannot_leave_the_video_folder(written, tmp_path, video_id):
    with pytest.raises(ValueError, match="not a path inside the video folder"):
        find_video(tmp_path, video_id)
    with pytest.raises(ValueError, match="not a path inside the video folder"):
        load_annotations(written("a.jsonl", timelens_row(videos=[video_id])), videos=tmp_path)

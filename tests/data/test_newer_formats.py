"""Rows of the projects of 2026, as their publications describe them, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempsamp_fast.data.annotations import load_annotations, read_annotations
from tempsamp_fast.data.newer_formats import quoted

EVENTS = {
    "source": "queryd", "video_path": "queryd/v1.mp4", "duration": 60.5,
    "events": [{"query": "A man runs.", "span": [[0, 10], [50, 60]]}, {"query": "A dog", "span": [[5, 6.5]]}],
}  # fmt: skip
FLAT = {"video_path": "v2.mp4", "duration": 40, "query": "A cat", "span": [10, 20]}
ORARL = {
    "problem": "Find the event 'A man opens a door' in the video.", "answer": "<answer>12 to 18</answer>",
    "images": [], "videos": [{"video": "v3.mp4", "fps": 2.0, "max_frames": 128}], "problem_type": "temporal_grounding",
    "source": "cosmo", "duration": 40,
}  # fmt: skip
OMTG = 'index\tvideo\tquestion\tanswer\n0\tv4.mp4\tWhen does "a goal\'s scored" occur?\t{}\n'
TAGS = "<time>50 - 60 seconds</time> <time>0 - 10.5 seconds</time>"


def written(tmp_path: Path, name: str, *rows) -> Path:
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_timelens2_rows_have_several_spans_and_offline_answers(tmp_path):
    rollouts = ["<answer>[[10, 20]]</answer>", "10 - 15 seconds", "no idea", [[12, 22]], 0.25]
    path = written(tmp_path, "timelens2-93k.jsonl", EVENTS, {**FLAT, "rollouts": rollouts})
    first, second, third = load_annotations(path, videos="clips")
    assert (first.sample_id, str(first.video)) == ("queryd/v1.mp4/1/0", "clips/queryd/v1.mp4")
    assert (first.windows, first.query, first.offline_ious) == (((0, 10), (50, 60)), "A man runs.", ())
    assert second.windows == ((5, 6.5),) and third.windows == ((10, 20),)
    assert third.offline_ious == pytest.approx((1, 0.5, 0, 8 / 12, 0.25))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**FLAT, "rollouts": [2]}, "rollouts has 2, expected an IoU"),
        ({**FLAT, "rollouts": [[[1, 2, 3]]]}, "rollouts has [1, 2, 3], expected a pair"),
        ({**FLAT, "rollouts": "x"}, "rollouts is 'x', expected a list"),
        ({**FLAT, "span": [[1, "x"]]}, "window [1, 'x'] has 'x'"),
        ({**EVENTS, "events": [7]}, "event is 7"),
        ({**ORARL, "videos": []}, "videos is [], expected a list of one path"),
        ({**ORARL, "answer": "later"}, "window is 'later'"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_place(tmp_path, row, message):
    with pytest.raises(ValueError) as error:
        read_annotations(written(tmp_path, "a.jsonl", row))
    assert f"{tmp_path / 'a.jsonl'}: line 1" in str(error.value) and message in str(error.value)


def test_orarl_rows_of_temporal_grounding_are_read_and_others_passed_over(tmp_path):
    others = {**ORARL, "problem_type": "spatial_temporal_grounding"}, {**ORARL, "problem_type": "tracking"}
    pair = {**ORARL, "answer": [3, 4.5], "videos": ["v5.mp4"], "problem": "A man."}
    path = written(tmp_path, "a.jsonl", ORARL, *others, pair)
    first, second = load_annotations(path)
    assert (first.query, first.windows, first.video.name) == ("A man opens a door", ((12, 18),), "v3.mp4")
    assert (second.query, second.windows, second.sample_id) == ("A man.", ((3, 4.5),), "v5.mp4/4")


def test_omtg_is_a_table_of_questions_and_answers_in_time_tags(tmp_path):
    (sample,) = load_annotations(written(tmp_path, "OMTGBench.tsv", OMTG.format(TAGS)))
    assert (sample.query, sample.windows) == ("a goal's scored", ((0, 10.5), (50, 60)))
    assert sample.duration_s == 60 and sample.video.name == "v4.mp4"
    found = read_annotations(written(tmp_path, "b.tsv", OMTG.format(TAGS) + "1\tv4.mp4\tWhen?\tnever"))
    assert len(found.samples) == 1 and "no true window" in found.dropped[0]
    with pytest.raises(ValueError, match="row 1: no field 'video'"):
        read_annotations(written(tmp_path, "c.tsv", "a\tb\n1\t2"))


def test_vue_tr_and_momentseeker_rows(tmp_path):
    vue = {"query_id": 7, "video": "v6", "duration": 90.5, "query": "A cat", "gt": [[1, 2], [30, 31.5]]}
    (sample,) = load_annotations(written(tmp_path, "vue.json", [vue]))
    assert (sample.sample_id, sample.windows, sample.duration_s) == ("7", ((1, 2), (30, 31.5)), 90.5)
    rows = [
        {"src_video_path": "a/v7.mp4", "qry_text": "A dog", "answering_time_interval": spans, "task": "t"}
        for spans in ([3, 4], [[1, 2], [3, 5]], [[6, 9], [1, 2]])
    ]
    first, second, third = load_annotations(written(tmp_path, "t2v.json", rows))
    assert (first.windows, first.duration_s, second.windows) == (((3, 4),), 4, ((1, 2), (3, 5)))
    assert (third.windows, third.duration_s) == (((6, 9), (1, 2)), 9)


@pytest.mark.parametrize(
    ("question", "query"),
    [
        ("A man's dog", "A man's dog"),
        ("Find 'a man's dog' now", "a man's dog"),
        ("<video>\nA man", "A man"),
        ("Find \u201ca man\u201d", "a man"),
        ("''", "''"),
        ("", ""),
    ],
)
def test_the_query_is_what_a_question_quotes(question, query):
    assert quoted(question) == query

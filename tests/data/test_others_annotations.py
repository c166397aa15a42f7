"""Annotation files as others write them: common forms are read, and a flaw is one short line that names its place."""

import gzip
import json
import os
from pathlib import Path

import pytest

from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.annotations import load_annotations, read_annotations
from tempsamp_fast.data.catalogue import load_training_data

LONG = 300
"""Letters that the part of a message beside the file's name may take."""


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return path

    return write


def refusal(path, **options):
    with pytest.raises(ValueError) as error:
        read_annotations(path, **options)
    message = str(error.value)
    assert message.startswith(str(path)) and len(message) < len(str(path)) + LONG and "\n" not in message
    return message.removeprefix(str(path))


ENTRY = {"duration": 20, "timestamps": [[0, 10]], "sentences": ["One."]}
TIME_R1 = {"video": "sub/v1.mp4", "duration": 20.5, "timestamp": [1, 2.5], "sentence": "One.", "qid": "my|x|v1"}
DETR = {"qid": 3, "query": "One.", "duration": 30.96, "vid": "AB1", "relevant_windows": [[24.3, 30.4]]}


@pytest.mark.parametrize("as_rows", [lambda rows: json.dumps(rows), lambda rows: "\n".join(map(json.dumps, rows))])
def test_time_r1_rows_are_read_from_a_list_and_from_lines(written, as_rows):
    rows = [TIME_R1, {**TIME_R1, "video_start": None, "difficulty": 0.5}]
    name = "a.json" if as_rows(rows).startswith("[") else "a.jsonl"
    samples = load_annotations(written(name, as_rows(rows)), videos="clips")
    assert [sample.sample_id for sample in samples] == ["sub/v1.mp4/1", "sub/v1.mp4/2"]
    assert (str(samples[0].video), samples[0].windows, samples[0].query) == ("clips/sub/v1.mp4", ((1.0, 2.5),), "One.")
    assert samples[1].difficulty == 0.5


def test_a_stretch_of_a_file_is_refused_and_not_read_as_the_whole(written):
    assert ": row 1, video 'sub/v1.mp4': video_start is 3" in refusal(
        written("a.json", [{**TIME_R1, "video_start": 3}])
    )


@pytest.mark.parametrize("fields", [{}, {"relevant_clip_ids": [12, 13]}])
def test_moment_detr_rows_need_no_saliency(written, fields):
    (sample,) = load_annotations(written("a.jsonl", DETR | fields))
    assert (sample.sample_id, sample.windows, sample.clip_scores) == ("3", ((24.3, 30.4),), {})


@pytest.mark.parametrize("name", ["a.json.gz", "A.JSON.GZ", "a.json", "a.JSON"])
def test_a_compressed_file_is_read(written, name):
    (sample,) = load_annotations(written(name, gzip.compress(json.dumps({"v1": ENTRY}).encode())))
    assert sample.video_id == "v1"


@pytest.mark.parametrize("name", ["a.JSONL", "a.jsonl.gz", "a.JsonL"])
def test_rows_are_known_by_their_suffix_in_any_case(written, name):
    assert load_annotations(written(name, DETR))[0].sample_id == "3"


@pytest.mark.parametrize(
    "content", [gzip.compress(b"{}" * 1000, mtime=0)[:-12], b"\x1f\x8b", b"\x1f\x8b junk junk", b"\xff\xfe{}"]
)
def test_a_damaged_file_is_named(written, content):
    assert "not a UTF-8 text file" in refusal(written("a.json.gz", content))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[" + ",".join(["[0.0, 1.0]"] * 20_000) + "]", ": row 1: expected an object, got '[0.0, 1.0]'"),
        ("a.json", [{"path": "v", "question": "q" * 9999}] * 99, ": row 1: of no form that is known by its fields, ["),
        ("a.json", {f"key{i}": "x" for i in range(20_000)}, ": video 'key0': entry is 'x', expected a dict"),
        ("a.json", {"v1": 7}, ": video 'v1': entry is 7, expected a dict"),
        ("a.json", {"v1": None, "v2": ENTRY}, ": video 'v1': entry is None"),
        ("a.json", {"v1": "queries"}, ": video 'v1': entry is 'queries'"),
        ("a.json", {"v" * 9999: 7}, ": video 'vvv"),
        ("a.json", {"v1": dict.fromkeys(map(str, range(9999)))}, ": video 'v1': no field 'sentences', only ['0'"),
        ("a.json", "7", ": content is 7, expected a dict"),
        ("a.json", '"' + "x" * 99_999 + '"', ": content is 'xxx"),
        ("a.json", "[" * 100_000 + "]" * 100_000, ": malformed JSON"),
        ("a.json", '{"v1":' * 100_000, ": malformed JSON"),
        ("a.json", {"v1": ENTRY | {"duration": 10**400}}, ": video 'v1', query 0: duration has 1000"),
        ("a.json", '{"v1": {"duration": ' + "9" * 5000 + "}}", ": malformed JSON"),
        ("a.json", {"v1": ENTRY | {"timestamps": [[0, 10**400]]}}, "expected a finite number"),
        ("a.json", {"v1": ENTRY | {"timestamps": [[0] * 9999]}}, "is not a pair"),
        ("a.json", {"v1": ENTRY | {"timestamps": "x" * 9999}}, ": video 'v1': timestamps is 'xxx"),
        ("a.json", {"v1": ENTRY | {"sentences": [["x"] * 9999]}}, "query is ['x', 'x'"),
        ("a.json", '{"v1": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a \\ud800 b"]}}',
         "query 'a \\ud800 b' has half"),
        ("a.json", '{"v\\udc80": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a"]}}',
         "id 'v\\udc80/0' has half"),
        ("a.json", '{"v\\u0000": {"duration": 9, "timestamps": [[0, 1]], "sentences": ["a"]}}',
         "is not a path inside"),
        ("a.jsonl", {**DETR, "qid": [1] * 9999}, ": line 1, video 'AB1': qid is [1, 1"),
        ("a.jsonl", {**DETR, "relevant_clip_ids": [1], "saliency_scores": [[9] * 9999]}, "saliency_scores has [9, 9"),
        ("a.jsonl", {"problem": "q", "videos": ["v"] * 9999}, ": line 1: videos is ['v', 'v'"),
        ("a.txt", "AB1 1 2 " + "x" * 9999, ": line 1: 'AB1 1 2 xxx"),
    ],
)  # fmt: skip
def test_a_flaw_is_one_short_line_with_its_place_and_value(written, name, content, said):
    assert said in refusal(written(name, content)) or name == "a.txt"


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.json", '{"v1": ENTRY, "v2": ENTRY, "v1": ENTRY}', ": malformed JSON (the key 'v1'"),
        ("a.json", '{"v2": ENTRY, "v1": {"duration": 1, "duration": 2}}', ": malformed JSON (the key 'duration'"),
        ("a.jsonl", 'DETR\n{"qid": 1, "vid": "y", "vid": "x"}', ": line 2: malformed JSON (the key 'vid'"),
        ("a.json", '[DETR, {"qid": 1, "query": "y", "query": "x"}]', ": malformed JSON (the key 'query'"),
    ],
)
def test_a_json_key_that_comes_twice_is_refused_and_not_dropped(written, name, text, place):
    text = text.replace("ENTRY", json.dumps(ENTRY)).replace("DETR", json.dumps(DETR))
    assert refusal(written(name, text)) == f"{place} comes twice in one object)"


def test_charades_tables_are_read_with_a_byte_order_mark_and_short_rows_are_named(written):
    path = written("a.txt", "AB1 1 2##one")
    table = written("Charades_v1_test.csv", "\ufeffid,length\nAB1,30\n")
    assert load_annotations(path)[0].duration_s == 30
    table.write_text("id,length\nAB1\n")
    with pytest.raises(ValueError, match=r"Charades_v1_test\.csv: video 'AB1', length: None is not a number"):
        load_annotations(path)


def test_a_video_too_short_for_hundredths_of_a_second_is_dropped(written):
    annotations = read_annotations(
        written("a.json", {"v1": ENTRY, "v2": ENTRY | {"duration": 0.004, "timestamps": [[0, 1]]}})
    )
    assert len(annotations.samples) == 1 and "below 0.01 s" in annotations.dropped[0]


@pytest.mark.parametrize(
    ("content", "missing"),
    [
        ({"v1": ENTRY}, "1 of 1"),
        ([TIME_R1], "1 of 1"),
        ([DETR, DETR | {"qid": 4}], "2 of 2"),
        ([DETR | {"relevant_clip_ids": [12], "saliency_scores": [[1, 2, 3]]}, DETR | {"qid": 4}], "1 of 2 .* '4'"),
        ([DETR | {"relevant_clip_ids": [], "saliency_scores": []}], "1 of 1"),
    ],
)
def test_highlights_need_clip_scores(written, tmp_path, content, missing):
    """In training as in evaluation, and in the held-out file as in the training file."""
    path = str(written("a.json", content))
    scored = DETR | {"relevant_clip_ids": [12], "saliency_scores": [[1, 2, 3]]}
    good = str(written("good.jsonl", scored))
    for words in ({"annotations": path}, {"annotations": good, "eval_annotations": path}):
        with pytest.raises(ValueError, match=rf"--task highlight: .*a\.json has no clip scores for {missing}"):
            load_training_data(DataConfig(videos=str(tmp_path), task="highlight", **words))
    assert len(load_training_data(DataConfig(videos=str(tmp_path), task="highlight", annotations=good))[0]) == 1


def test_queries_whose_clips_all_have_score_0_are_not_learnt_from(written, tmp_path):
    rows = [{**DETR, "qid": i, "relevant_clip_ids": [12], "saliency_scores": [[0, i, 0]]} for i in (0, 3)]
    data = DataConfig(videos=str(tmp_path), task="highlight", annotations=str(written("a.json", rows)))
    assert [sample.sample_id for sample in load_training_data(data)[0]] == ["3"]


SHARED = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[3] / "shared/data")) / "annotations"


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"real annotations: no folder {SHARED}; set TEMPSAMP_SHARED")
def test_the_real_charades_file_reads_alike_in_every_form(written):
    """Compressed, as Time-R1's list and as moment_detr's lines."""
    content = json.loads((SHARED / "charades_test.json").read_text())
    queries = [
        (video, entry["duration"], *query)
        for video, entry in content.items()
        for query in zip(entry["timestamps"], entry["sentences"], strict=True)
    ]
    names = ("video", "duration", "timestamp", "sentence")
    listed = [dict(zip(names, query, strict=True)) for query in queries]
    names = ("vid", "duration", "relevant_windows", "query")
    lines = [{"qid": i, **dict(zip(names, (v, d, [w], q), strict=True))} for i, (v, d, w, q) in enumerate(queries)]
    facts = lambda path: [(s.video_id, s.duration_s, s.windows, s.query) for s in load_annotations(path)]
    expected = facts(SHARED / "charades_test.json")
    assert len(expected) == 3720
    assert facts(written("a.json.gz", gzip.compress(json.dumps(content).encode()))) == expected
    assert facts(written("b.json", listed)) == expected
    assert facts(written("c.jsonl.gz", gzip.compress("\n".join(map(json.dumps, lines)).encode()))) == expected

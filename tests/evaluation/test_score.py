"""Metrics against cases computed by hand, and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.evaluation.scoring import (
    best_constant_span,
    grounding_scores,
    highlight_scores,
    moment_retrieval_scores,
    oracle_ious,
    ranking_average_precision,
    score_rows,
    score_spans,
    window_average_precision,
)
from tempsamp_fast.sample import Sample
from tempsamp_fast.score import main


def sample(*windows, duration_s=20.0, clip_scores=None, name="s"):
    return Sample(name, Path("v.mp4"), "query", duration_s, windows, clip_scores or {})


def test_means_are_over_all_queries_and_unparsed_answers_count_0():
    scores = grounding_scores([1.0, 0.5, 0.3, None])
    assert scores == {"miou": 0.45, "r1@0.3": 0.75, "r1@0.5": 0.5, "r1@0.7": 0.25, "parse_rate": 0.75}


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="ious is empty"):
        grounding_scores([])


def test_a_parsed_miss_differs_from_an_unparsed_answer_in_parse_rate_alone():
    miss, unparsed = (score_spans([sample((0, 1))], [span]) for span in ((5.0, 6.0), None))
    assert miss == {**unparsed, "parse_rate": 1.0} and unparsed["parse_rate"] == 0


def test_oracle_takes_the_better_mode_of_each_query():
    assert oracle_ious([[0.1, None, 0.5, None], [0.3, 0.2, None, None]]) == [0.3, 0.2, 0.5, None]


def test_a_span_is_scored_against_its_best_window():
    assert score_spans([sample((0, 4), (6, 8))], [(6.0, 8.0)])["miou"] == 1.0


@pytest.mark.parametrize(
    "predicted, windows, ap",
    [
        ([], [(0, 10)], 0),
        ([(0, 10)], [(0, 10)], 1),
        ([(0, 10)], [(0, 10), (20, 30)], 0.5),
        ([(0, 10), (0, 10), (20, 30)], [(0, 10), (20, 30)], (1 + 2 / 3) / 2),
        ([(50, 60), (0, 10), (20, 30)], [(0, 10), (20, 30)], 2 / 3),
        ([(0, 5)], [(0, 10)], 1),
        ([(0, 4.9)], [(0, 10)], 0),
        ([(50, 60)] * 9 + [(0, 10)], [(0, 10)], 1 / 10),
        ([(50, 60)] * 10 + [(0, 10)], [(0, 10)], 0),
    ],
)
def test_window_average_precision_at_half_overlap(predicted, windows, ap):
    assert window_average_precision(predicted, windows, 0.5) == pytest.approx(ap)


def test_a_second_hit_on_a_taken_window_goes_to_the_next_free_one_it_overlaps_enough():
    assert window_average_precision([(0, 10), (0, 10)], [(0, 10), (0, 8)], 0.5) == 1


def test_of_windows_overlapped_alike_the_last_one_is_taken():
    """Only the first one is left for the other prediction, as in moment_detr's evaluation; half of each is hit."""
    assert window_average_precision([(0, 10), (5, 10)], [(0, 5), (5, 10)], 0.5) == 0.5
    assert window_average_precision([(0, 10), (0, 5)], [(0, 5), (5, 10)], 0.5) == 1


def test_moment_retrieval_map_averages_thresholds_and_queries():
    """IoU 0.72 passes five of the ten thresholds; the other query has no prediction."""
    scores = moment_retrieval_scores([sample((0, 10)), sample((0, 10))], [[(0, 7.2)], []])
    assert scores == pytest.approx({"mr_map": 0.25, "mr_map@0.5": 0.5, "mr_map@0.75": 0.0})


@pytest.mark.parametrize(
    "relevant, scores, ap",
    [
        ([1, 0, 1], [0.9, 0.8, 0.7], (1 + 2 / 3) / 2),
        ([0, 1, 0], [0.9, 0.8, 0.7], 1 / 2),
        ([1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], 1 / 2),
        ([1, 1, 0, 1], [0.9, 0.9, 0.5, 0.4], (1 + 3 / 4) / 2),
        ([0, 1, 1], [0.9, 0.8, 0.7], 2 / 3),
        ([0, 0, 0], [0.9, 0.8, 0.7], 0),
        ([1, 1, 1], [0.9, 0.8, 0.7], 1),
    ],
)
def test_ranking_average_precision_with_ties_as_one_rank(relevant, scores, ap):
    assert ranking_average_precision(np.array(relevant, dtype=bool), np.array(scores)) == pytest.approx(ap)


def test_highlight_scores_average_annotators_then_queries():
    """Annotators 1 and 2 call clip 0 Very Good, annotator 3 nothing; clip 1 is ranked first."""
    truth = sample(duration_s=8.0, clip_scores={0: (4, 4, 3), 1: (3, 3, 3)})
    scores = highlight_scores([truth], [{2.0: 3.0, 0.0: 2.0}])
    assert scores == pytest.approx({"hl_map": (0.5 + 0.5 + 0) / 3, "hit@1": 0})


def test_hit_at_1_needs_one_annotator_and_the_first_clip_wins_a_tie():
    truth = sample(duration_s=8.0, clip_scores={0: (4, 1, 1), 1: (1, 1, 1)})
    assert highlight_scores([truth], [{0.0: 2.0, 2.0: 2.0}])["hit@1"] == 1
    assert highlight_scores([truth], [{2.0: 2.1, 0.0: 2.0}])["hit@1"] == 0


@pytest.mark.parametrize("duration_s", [6.0, 7.0, 7.9])
def test_a_last_clip_that_is_not_whole_does_not_count(duration_s):
    """And one that is not predicted scores 0, whatever is predicted of the others."""
    truth = sample(duration_s=duration_s, clip_scores={0: (4,), 3: (4,)})
    assert highlight_scores([truth], [{0.0: 0.5}]) == {"hl_map": 1.0, "hit@1": 1.0}


def test_clips_left_out_share_the_last_rank_of_the_whole_clips_there_are():
    """Eight and a half seconds have four whole clips: one is predicted, the Very Good one is among the other three."""
    truth = sample(duration_s=8.5, clip_scores={0: (4,)})
    assert highlight_scores([truth], [{2.0: 1.0}]) == {"hl_map": 1 / 4, "hit@1": 0}


def test_no_highlight_prediction_counts_0():
    truth = sample(duration_s=8.0, clip_scores={0: (4, 4, 4)})
    assert highlight_scores([truth, truth], [None, {0.0: 5.0}]) == {"hl_map": 0.5, "hit@1": 0.5}


def test_highlight_metrics_need_clip_scores():
    with pytest.raises(ValueError, match="sample 's' has no clip scores"):
        highlight_scores([sample((0, 1))], [{0.0: 1.0}])


@pytest.mark.parametrize("order", [1, -1])
def test_best_constant_span_finds_the_common_answer(order):
    samples = [sample((3.0, 9.0))] * 3 + [sample((12.0, 14.0), (3.0, 9.0))]
    span, miou = best_constant_span(samples[::order])
    assert span == pytest.approx((3.0, 9.0), abs=0.02)
    assert miou == pytest.approx(1.0, abs=0.01)


def test_best_constant_span_beats_a_fine_grid():
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 20, 60)
    samples = [sample((float(s), float(s + d))) for s, d in zip(starts, rng.uniform(2, 12, 60), strict=True)]
    span, miou = best_constant_span(samples)
    assert miou == pytest.approx(score_spans(samples, [span] * 60)["miou"])
    grid = np.linspace(0, 32, 65)
    assert miou >= max(score_spans(samples, [(a, b)] * 60)["miou"] for a in grid[::2] for b in grid[::2]) - 1e-3


@pytest.fixture
def files(tmp_path):
    """Annotations of two queries, and a function that writes prediction rows."""
    annotations = tmp_path / "a.json"
    entry = {"duration": 20, "timestamps": [[0, 10], [5, 15]], "sentences": ["One.", "Two."]}
    annotations.write_text(json.dumps({"v1": entry}))

    def predictions(*rows):
        path = tmp_path / "p.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return ["--annotations", str(annotations), "--predictions", str(path)]

    return predictions


def test_command_line_takes_ids_or_queries_and_texts_or_spans(files, capsys):
    arguments = files(
        {"vid": "v1", "query": "two", "span": [5, 15]}, {"sample_id": "v1/0", "text": "<answer>0 to 5</answer>"}
    )
    main([*arguments, "--json"])
    metrics = {
        "protocol": "own",
        "num_queries": 2,
        "miou": 0.75,
        "r1@0.3": 1.0,
        "r1@0.5": 1.0,
        "r1@0.7": 0.5,
        "parse_rate": 1.0,
    }
    assert json.loads(capsys.readouterr().out) == metrics
    main(arguments)
    assert "miou             0.75" in capsys.readouterr().out


def test_answers_without_tags_count_where_they_are_asked_for(files, capsys):
    arguments = files({"sample_id": "v1/0", "text": "0 to 10"}, {"sample_id": "v1/1", "text": "5 to 15"})
    for words, miou in ([], 0), (["--untagged"], 1):
        main([*arguments, *words, "--json"])
        assert json.loads(capsys.readouterr().out)["miou"] == miou


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"sample_id": "v1/0", "span": [0, 1]}], r"no prediction for 1 of 2 samples: v1/1"),
        ([{"sample_id": "v9/0", "span": [0, 1]}], r"line 1: sample_id 'v9/0' is not in the annotations"),
        ([{"vid": "v1", "query": "six"}], r"line 1: vid 'v1' with query 'six' is not in the annotations"),
        ([{"sample_id": "v1/0", "span": None}] * 2, r"line 2: sample_id 'v1/0' has a prediction already"),
        ([{"vid": "v1", "text": ""}], r"line 1: no field 'query', only \['vid', 'text'\]"),
        ([{"text": ""}], r"line 1: no field 'vid', only \['text'\]"),
        ([{"vid": 1, "query": "six"}], r"line 1: vid is 1, expected a str"),
        ([{"sample_id": "v1/0"}, {"sample_id": "v1/1"}], r"line 1: .* has no text, span, spans or pred_relevant"),
        *(
            ([{"sample_id": "v1/0", "text": ""}, {"sample_id": "v1/1", **row}], rf"p\.jsonl: line 2: .*{message}")
            for row, message in (
                ({"text": 3}, "text is 3, expected a str"),
                ({"text": ["0 to 1"]}, "text is .*, expected a str"),
                ({"span": ["0", 1]}, r"has \['0', 1\], expected the numbers"),
                ({"span": [0, float("nan")]}, r"has \[0, nan\], expected the"),
                ({"span": [False, True]}, r"has \[False, True\], expected the"),
                ({"span": 5}, "span has 5, expected the numbers"),
                ({"spans": [1, 2]}, "spans has 1, expected the numbers"),
                ({"spans": "1 to 2"}, "spans is not a list"),
                ({"pred_relevant_windows": [[1, 2]]}, "expected the numbers start, end, confidence"),
                ({"pred_saliency_scores": [True]}, "pred_saliency_scores is not a list of numbers"),
            )
        ),
        ([3], r"line 1: expected an object, got '3'"),
    ],
)
def test_command_line_names_what_is_wrong(files, capsys, rows, message):
    with pytest.raises(SystemExit) as exit_info:
        main(files(*rows))
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_true_answers_score_1_on_every_task(tmp_path, capsys):
    row = {"qid": 1, "query": "q", "vid": "v", "duration": 12, "relevant_windows": [[2, 4], [8, 10]]}
    row |= {"relevant_clip_ids": [1, 4], "saliency_scores": [[4, 4, 4], [4, 4, 4]]}
    annotations, predictions = tmp_path / "a.jsonl", tmp_path / "p.jsonl"
    annotations.write_text(json.dumps(row))
    truth = sample((2, 4), (8, 10), duration_s=12, clip_scores={1: (4, 4, 4), 4: (4, 4, 4)})
    for task in ("grounding", "multi_grounding", "highlight"):
        predictions.write_text(json.dumps({"sample_id": "1", "text": off_policy_text(truth, "think", task=task)}))
        main(["--annotations", str(annotations), "--predictions", str(predictions), "--task", task, "--json"])
        metrics = json.loads(capsys.readouterr().out)
        assert set(metrics.values()) == {1, "own"}, (task, metrics)


@pytest.fixture
def highlights(tmp_path):
    """QVHighlights annotations of one query about 12 seconds, and a function that writes its prediction row."""
    row = {"qid": 1, "query": "q", "vid": "v", "duration": 12, "relevant_windows": [[2, 4], [8, 10]]}
    row |= {"relevant_clip_ids": [1, 4], "saliency_scores": [[4, 4, 4], [3, 4, 3]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))

    def prediction(task, **fields):
        path = tmp_path / "p.jsonl"
        path.write_text(json.dumps({"qid": 1, "vid": "v", **fields}))
        return ["--annotations", str(tmp_path / "a.jsonl"), "--predictions", str(path), "--task", task, "--json"]

    return prediction


@pytest.mark.parametrize("task, place", [("grounding", 1), ("multi_grounding", 0)])
def test_of_several_spans_in_a_text_the_task_says_which_is_the_answer(task, place):
    text, spans = "<answer> 0 to 10, 2 to 4 </answer>", [(0.0, 10.0), (2.0, 4.0)]
    assert score_rows([sample(spans[place])], [{"text": text}], task)["miou"] == 1
    assert score_rows([sample(spans[1 - place])], [{"text": text}], task)["miou"] < 1


@pytest.mark.parametrize("require_tags, parse_rate", [(True, 0), (False, 1)])
@pytest.mark.parametrize("task", ["grounding", "multi_grounding", "highlight"])
def test_untagged_texts_are_read_where_they_may_be(task, require_tags, parse_rate):
    truth = sample((0, 2), duration_s=8.0, clip_scores={0: (4, 4, 4)})
    text = off_policy_text(truth, "answer", task=task).removeprefix("<answer>").removesuffix("</answer>")
    assert score_rows([truth], [{"text": text}], task, require_tags)["parse_rate"] == parse_rate


@pytest.mark.parametrize(
    "scores, hl_map, hit",
    [
        ([-0.5, 0.9, -0.5, -0.5, 0.2, -0.5], 1, 1),
        ([-0.1, -0.2, -0.5, -0.5, -0.3, -0.5], (1 / 2 + 2 / 3 + 1 / 2) / 3, 0),
        ([], 0, 0),
    ],
)
def test_saliency_per_clip_is_scored_like_words(highlights, capsys, scores, hl_map, hit):
    """Clip 1 is Very Good to all annotators, clip 4 to the second one."""
    main(highlights("highlight", pred_saliency_scores=scores))
    metrics = json.loads(capsys.readouterr().out)
    expected = {"num_queries": 1, "hl_map": hl_map, "hit@1": hit, "parse_rate": float(bool(scores))}
    assert metrics.pop("protocol") == "own" and metrics == pytest.approx(expected)


def test_windows_with_confidences_are_ranked_by_them(highlights, capsys):
    windows = [[8, 10, 0.2], [20, 30, 0.1], [2, 4, 0.9]]
    main(highlights("multi_grounding", pred_relevant_windows=windows))
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["mr_map"] == metrics["miou"] == 1
    main(highlights("grounding", pred_relevant_windows=[[2, 4, 0.9], [20, 30, 0.1]]))
    assert json.loads(capsys.readouterr().out)["miou"] == 1


@pytest.mark.parametrize(
    "task, fields, message",
    [
        ("highlight", {"span": [0, 2]}, "has no text or pred_saliency_scores"),
        ("highlight", {"pred_saliency_scores": [1, "2"]}, "pred_saliency_scores is not a list of numbers"),
        ("highlight", {"pred_saliency_scores": {"0": 1}}, "pred_saliency_scores is not a list of numbers"),
        ("multi_grounding", {"pred_relevant_windows": [[0, 2]]}, r"has \[0, 2\], expected the numbers start, end, con"),
        ("grounding", {"spans": 5}, "spans is not a list"),
    ],
)
def test_a_prediction_that_lacks_what_its_task_needs_is_an_error(highlights, capsys, task, fields, message):
    with pytest.raises(SystemExit, match="2"):
        main(highlights(task, **fields))
    assert re.search(message, capsys.readouterr().err)


def test_scoring_does_not_import_the_training_stack(files):
    arguments = files({"sample_id": "v1/0", "span": [0, 10]}, {"sample_id": "v1/1", "span": None})
    code = "import sys; from tempsamp_fast.score import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def twice(tmp_path):
    """Annotations in which a video has one query twice, written in two ways, and a function that writes rows."""
    entry = {"duration": 20, "timestamps": [[0, 10], [5, 15], [10, 20]], "sentences": ["One.", "Two.", "one"]}
    (tmp_path / "a.json").write_text(json.dumps({"v1": entry}))

    def words(*rows, start=""):
        (tmp_path / "p.jsonl").write_text(start + "\n".join(map(json.dumps, rows)), encoding="utf-8")
        return ["--annotations", str(tmp_path / "a.json"), "--predictions", str(tmp_path / "p.jsonl"), "--json"]

    return words


def row(query, *span):
    return {"vid": "v1", "query": query, "span": list(span)}


@pytest.mark.parametrize(
    ("rows", "miou"),
    [
        ([row("one", 0, 10), row("two", 5, 15), row("One.", 10, 20)], 1.0),
        ([row("one", 10, 20), row("one", 0, 10), row("two", 5, 15)], 1 / 3),
        ([row("two", 5, 15), row("one", 0, 10)], 2 / 3),
    ],
)
def test_a_query_that_a_video_has_twice_is_scored_in_order_or_by_its_one_row(twice, capsys, rows, miou):
    main(twice(*rows))
    assert json.loads(capsys.readouterr().out)["miou"] == pytest.approx(miou)


def test_a_third_row_for_a_query_that_comes_twice_is_refused(twice, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(twice(row("one", 0, 1), row("two", 0, 1), row("one", 0, 1), row("one", 0, 1)))
    assert "line 4: vid 'v1' with query 'one' has a prediction already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sample_id", "qid"])
def test_a_row_by_an_id_answers_that_sample_alone(twice, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        main(twice({name: "v1/0", "span": [0, 10]}, row("two", 5, 15)))
    assert "no prediction for 1 of 3 samples: v1/2" in capsys.readouterr().err


def test_predictions_may_begin_with_a_byte_order_mark(twice, capsys):
    main(twice(row("one", 0, 10), row("two", 5, 15), row("one", 10, 20), start="\ufeff"))
    assert json.loads(capsys.readouterr().out)["miou"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"span": [0, 10**400]},
        {"span": ["x" * 9999, 1]},
        {"spans": [[0, 1]] * 9999 + [7]},
        {"text": None, "note": "x" * 9999},
        {"vid": "x" * 9999},
    ],
)
def test_a_flaw_of_a_prediction_is_one_short_line(twice, capsys, fields):
    with pytest.raises(SystemExit, match="2"):
        main(twice({"vid": "v1", "query": "one", **fields}, row("two", 5, 15)))
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 500

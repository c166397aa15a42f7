"""Published protocols: what each counts of the same answers, and that figures always say which they follow."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempsamp_fast.evaluation.events import best_matching, etf1, threshold_auc
from tempsamp_fast.evaluation.protocols import PROTOCOLS, protocol_for
from tempsamp_fast.evaluation.published import METRICS, MIXED_PROTOCOLS, comparison, published_results
from tempsamp_fast.sample import Sample
from tempsamp_fast.score import main

SAMPLE = Sample("v/0", Path("v.mp4"), "query", 30.0, ((12.4, 17.6),))
GIVEN = ((0.0, 10.0), (50.0, 60.0), (90.0, 100.0))


@pytest.mark.parametrize(
    ("predicted", "c_acc", "tiou", "tf1", "whole"),
    [
        ([(0, 10), (52, 60), (94, 100)], 1, 0.8, (1, 1, 0.6667), 0.8889),
        ([(0, 10), (50, 60)], 0, 0.6667, (0.8, 0.8, 0.8), 0),
        ([(0, 10), (52, 60), (70, 80)], 1, 0.45, (0.6667, 0.6667, 0.6667), 0.6667),
        ([(0, 10), (50, 60), (90, 95), (95, 100)], 0, 1, (0.8571, 0.8571, 0.5714), 0),
    ],
)
def test_the_published_numbers_of_answers_with_several_spans(predicted, c_acc, tiou, tf1, whole):
    found = etf1(predicted, GIVEN)
    assert (found["c_acc"], found["tiou"], found["etf1"]) == pytest.approx((c_acc, tiou, whole), abs=6e-5)
    assert [found[f"tf1@{each}"] for each in (0.3, 0.5, 0.7)] == pytest.approx(tf1, abs=6e-5)


def test_nothing_said_of_nothing_is_right_and_of_something_is_wrong():
    assert etf1([], []) == {"c_acc": 1, "tiou": 0, "tf1@0.3": 1, "tf1@0.5": 1, "tf1@0.7": 1, "etf1": 1}
    assert set(etf1([], GIVEN).values()) == set(etf1(GIVEN, []).values()) == {0}


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_matching_is_the_best_of_all_pairings(num_rows, num_columns, data):
    tenths = st.integers(0, 10).map(lambda tenth: tenth / 10)
    size = num_rows * num_columns
    table = np.array(data.draw(st.lists(tenths, min_size=size, max_size=size))).reshape(num_rows, num_columns)
    pairs = best_matching(table)
    assert len(pairs) == min(table.shape) == len({row for row, _ in pairs}) == len({column for _, column in pairs})
    tall = table if num_rows >= num_columns else table.T
    orders = itertools.permutations(range(tall.shape[0]), tall.shape[1])
    best = max(sum(tall[row, column] for column, row in enumerate(order)) for order in orders)
    assert sum(table[pair] for pair in pairs) == pytest.approx(best)


TEXTS = {
    "12.54 - 17.83": {"paper": 0.0, "timelens": 0.8214, "release": 0.8214, "orarl": 0.8214, "timelens2": 0.0},
    "<answer> 12.54 to 17.83 </answer>": dict.fromkeys(("paper",), 0.9319)
    | dict.fromkeys(("timelens", "orarl"), 0.8214),
    "<answer>1 to 2</answer> <answer>12.4 to 17.6</answer>": {"paper": 1, "timelens": 0, "orarl": 0.8667},
    "<answer> 1 to 2, 12.4 to 17.6 </answer>": {"paper": 1, "timelens": 0, "orarl": 0},
    "[[12.4, 17.6], [20, 25.2]]": {"timelens2": 0.5, "paper": 0},
    "4.4 - 4.49": dict.fromkeys(("timelens", "release", "orarl"), 0),
}


@pytest.mark.parametrize(("text", "name"), [(text, name) for text in TEXTS for name in TEXTS[text]])
def test_the_same_answer_is_worth_what_each_protocol_makes_of_it(text, name):
    found = PROTOCOLS[name].scores([SAMPLE], [{"text": text}])
    assert found["miou"] == pytest.approx(TEXTS[text][name], abs=6e-5)
    assert set(found) <= set(METRICS)


def test_rounding_is_half_to_even_and_of_given_spans_too():
    assert PROTOCOLS["timelens"].spans({"text": "12.5 - 17.5"}) == [(12, 18)]
    assert PROTOCOLS["timelens"].spans({"span": [12.54, 17.83]}) == [(13, 18)]
    assert PROTOCOLS["paper"].spans({"span": [12.54, 17.83]}) == [(12.54, 17.83)]
    assert PROTOCOLS["paper"].spans({"spans": []}) is None
    for name in ("paper", "orarl"):
        assert PROTOCOLS[name].spans({"spans": [[1, 2], [5, 6]]}) == [(1, 2)]
        assert PROTOCOLS[name].spans({"pred_relevant_windows": [[5, 6, 0.2], [1, 2, 0.9]]}) == [(1, 2)]


def test_an_unread_answer_counts_as_a_span_beyond_the_video_or_as_nothing():
    """Windows that end late make the difference."""
    late = Sample("v/0", Path("v.mp4"), "query", 30.0, ((25.0, 50.0),))
    rows = [{"text": "no idea"}] * 2
    for name, value in (("timelens", 0.4), ("orarl", 0.4), ("release", 0.4), ("paper", 0), ("timelens2", 0)):
        found = PROTOCOLS[name].scores([late, SAMPLE], rows)
        assert (found["miou"], found["parse_rate"]) == (pytest.approx(value / 2), 0)


def test_on_timelens_bench_timelens2_counts_the_first_span():
    row = {"text": "[[12.4, 17.6], [20, 25.2]]"}
    assert protocol_for("timelens2", "timelens-bench-charades").scores([SAMPLE], [row])["miou"] == 1
    assert protocol_for("timelens2", "omtg-bench").scores([SAMPLE], [row])["miou"] == pytest.approx(0.5)


def test_the_published_area_of_vue_tr():
    assert threshold_auc([0.6, 0.25, 0.0, 1.0]) == pytest.approx(0.45875)
    vue_tr = protocol_for("timelens2", "vue-tr")
    found = vue_tr.scores([SAMPLE] * 2, [{"text": "[[12.4, 17.6]]"}, {"text": "no"}])
    assert (found["miou"], found["auc"]) == (0.5, pytest.approx(threshold_auc([1.0, 0.0])))
    assert vue_tr.budget.fps == 1 and set(found) <= set(METRICS)
    seeker = protocol_for("timelens2", "momentseeker").budget
    assert (seeker.fps, seeker.max_pixels, seeker.total_tokens) == (2, 480 * 480, 128_000)


def test_omtg_scores_every_span_in_time_tags():
    sample = Sample("v/0", Path("v.mp4"), "query", 120.0, GIVEN)
    text = " ".join(f"<time>{start} - {end} seconds</time>" for start, end in [(0, 10), (52, 60), (94, 100)])
    found = PROTOCOLS["omtg"].scores([sample, sample], [{"text": text}, {"text": "never"}])
    assert found["etf1"] == pytest.approx(0.8889 / 2, abs=6e-5) and found["parse_rate"] == 0.5
    with pytest.raises(ValueError, match="nothing to score"):
        PROTOCOLS["omtg"].scores([], [])


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("paper", {"fps": 2, "max_frames": 768, "total_pixels": 3584 * 28 * 28, "min_pixels": 16 * 28 * 28}),
        ("timelens", {"fps": 2, "total_pixels": 14336 * 28 * 28, "min_pixels": 64 * 28 * 28}),
        ("release", {"total_pixels": 14336 * 28 * 28, "max_frames": 768, "max_pixels": 786_432}),
        ("timelens2", {"fps": 4, "max_frames": 2048, "max_pixels": 409_600, "total_pixels": 128_000 * 28 * 28}),
        ("orarl", {"fps": 4, "max_frames": 2048, "max_pixels": 409_600, "total_pixels": 128_000 * 28 * 28}),
    ],
)
def test_frames_are_those_of_the_protocol_in_the_patches_of_the_model(name, frames):
    budget = PROTOCOLS[name].budget
    assert frames.items() <= budget.frames(28, counts_every_frame=False).items()
    over_all = budget.frames(32, counts_every_frame=True)
    assert over_all["total_pixels"] == frames["total_pixels"] * 2 * 32**2 / 28**2
    assert PROTOCOLS["omtg"].budget is None


HOW: dict[str, tuple] = {
    "paper": ("text", 2048, 2.0, 768, 16 * 28 * 28, 768 * 28 * 28, 3584 * 28 * 28),
    "release": ("example", 512, 2.0, 768, 4 * 28 * 28, 768 * 32 * 32, 14_336 * 28 * 28),
    "timelens": ("sentence", 512, 2.0, 768, 64 * 28 * 28, 768 * 32 * 32, 14_336 * 28 * 28),
    "timelens2": ("json", 2048, 4.0, 2048, None, 640 * 640, 128_000 * 28 * 28),
    "orarl": ("strict", 128, 4.0, 2048, None, 640 * 640, 128_000 * 28 * 28),
    "omtg": ("time_tags", 2048),
}
"""Form, longest answer; frames: rate, most of them, least and most pixels of one, most of all."""


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_asks_shows_and_cuts_off_as_it_is_published(name):
    protocol = PROTOCOLS[name]
    names = ("fps", "max_frames", "min_pixels", "max_pixels", "total_pixels")
    frames = protocol.budget.frames(28, counts_every_frame=False) if protocol.budget else {}
    shown = [frames[each] for each in names if frames]
    assert (protocol.answer_form, protocol.max_completion_length, *shown) == HOW[name]


@pytest.mark.parametrize(
    ("test", "fps", "max_pixels", "has_auc"),
    [
        *((name, 1, 640 * 640, True) for name in ("vue-tr", "vue-tr-v2")),
        *((name, 2, 480 * 480, False) for name in ("momentseeker", "ego4d-nlq")),
        *((name, 4, 640 * 640, False) for name in ("timelens-bench-charades", "activitynet-test", None)),
    ],
)
def test_timelens2_shows_some_sets_otherwise(test, fps, max_pixels, has_auc):
    """And every other protocol is the same for all of them."""
    protocol = protocol_for("timelens2", test)
    assert (protocol.budget.fps, protocol.budget.max_pixels, protocol.has_auc) == (fps, max_pixels, has_auc)
    assert all(protocol_for(name, test) is PROTOCOLS[name] for name in PROTOCOLS if name != "timelens2")


def test_the_command_prints_and_keeps_the_protocol(tmp_path, capsys):
    entry = {"duration": 30, "queries": ["query"], "spans": [[12.4, 17.6]]}
    (tmp_path / "charades-timelens.json").write_text(json.dumps({"v": entry}))
    (tmp_path / "p.jsonl").write_text(json.dumps({"sample_id": "v/0", "text": "12.54 - 17.83"}))
    words = ["--predictions", str(tmp_path / "p.jsonl"), "--annotations", str(tmp_path / "charades-timelens.json")]
    main([*words, "--protocol", "timelens"])
    printed = capsys.readouterr().out
    assert printed.startswith("protocol timelens: 2 fps") and "whole seconds" in printed and "0.8214" in printed
    main([*words, "--protocol", "timelens", "--json"])
    assert json.loads(capsys.readouterr().out)["protocol"] == "timelens"
    main([*words, "--untagged", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["protocol"], round(found["miou"], 4)) == ("own", 0.9319)
    with pytest.raises(SystemExit):
        main([*words, "--protocol", "timelens", "--untagged"])
    assert "leave out --task and --untagged" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "miou"), [("charades-timelens.json", 1), ("mine.json", 0.5)])
def test_the_command_follows_what_a_protocol_says_of_a_data_set(tmp_path, capsys, name, miou):
    """On TimeLens-Bench the first span counts, elsewhere all of them together."""
    (tmp_path / name).write_text(json.dumps({"v": {"duration": 30, "queries": ["query"], "spans": [[12.4, 17.6]]}}))
    (tmp_path / "p.jsonl").write_text(json.dumps({"sample_id": "v/0", "text": "[[12.4, 17.6], [20, 25.2]]"}))
    words = ["--predictions", str(tmp_path / "p.jsonl"), "--annotations", str(tmp_path / name)]
    main([*words, "--protocol", "timelens2", "--json"])
    assert json.loads(capsys.readouterr().out)["miou"] == pytest.approx(miou)


def test_a_table_says_where_its_rows_follow_several_protocols():
    ours = {"mode": "answer", "miou": 0.5, "parse_rate": 1.0}
    assert MIXED_PROTOCOLS not in comparison([ours | {"protocol": "paper"}], 1, "activitynet-test", ("main",))
    mixed = comparison([ours | {"protocol": "timelens"}], 1, "activitynet-test", ("main",))
    assert MIXED_PROTOCOLS in mixed
    bench = comparison([ours | {"protocol": "timelens"}], 1, "timelens-bench-charades")
    for line in ("TempSamp-R1-4B", "Video-ORA-9B", "TimeLens2-8B"):
        assert line in bench
    assert bench.splitlines()[2].endswith("  timelens") and MIXED_PROTOCOLS in bench


def test_published_rows_name_a_protocol_or_say_that_none_is_stated():
    for row in published_results():
        assert row.protocol in (*PROTOCOLS, "-") and row.source
    by_name = {(row.test, row.method): row for row in published_results()}
    assert by_name["timelens-bench-charades", "TempSamp-R1-4B"].metrics == {
        "miou": 57.1, "r1@0.3": 79.5, "r1@0.5": 65.4, "r1@0.7": 37.3,
    }  # fmt: skip
    assert by_name["timelens-bench-qvhighlights", "TimeLens2-4B"].metrics == {"miou": 69.3}
    assert by_name["omtg-bench", "OMTG-4B"].metrics["etf1"] == 43.65

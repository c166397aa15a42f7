"""The campaign of bench/paper_in_small.py: its plan, what it keeps of a run, and what it says of the results."""

import json

import numpy as np
import pytest

from bench.paper import plan
from bench.paper.campaign import Campaign, best_rate, jittered
from bench.paper.evidence import evidence
from bench.paper.plots import draw
from bench.paper.record import record_of
from bench.paper.results import check_same_settings, check_same_start, read_results
from bench.paper.summary import of_group_size, paired, records, steps_to_reach, summarise, verdict
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.report.runs import Interval

STEPS = (0, 40, 80)


def run_record(family, method, seed, miou, **fields):
    """A record of a run whose mIoU rises evenly from 0.1 to `miou`."""
    points = [0.1 + (miou - 0.1) * step / STEPS[-1] for step in STEPS]
    scores = [{"step": s, "miou": m, **dict.fromkeys(("r1@0.3", "r1@0.5", "r1@0.7"), m), "parse_rate": 1.0}
              for s, m in zip(STEPS, points, strict=True)]  # fmt: skip
    record = {
        "family": family,
        "method": method,
        "seed": seed,
        "num_generations": 4,
        "num_videos": None,
        "commit": "c0ffee0123",
        **fields,
    }
    record["evaluations"] = {"answer": scores}
    if method != "sft":
        part = [0.2] * 10
        record["rewards"] = {
            "hits": {"first_quarter": 0.05}, "groups_without_any_reward": 0.5,
            "best_of_group": {"low": part, "median": part, "high": part, "mean": part},
        }  # fmt: skip
        record["advantages"] = {
            "skewness": 1.0, "mean": {"off_policy": 1.2}, "limits": [-4, 4], "histogram": {"on_policy": [1, 2]},
        }  # fmt: skip
        record["format_reward"] = {}
    if family in ("pruning", "reward", "tree"):
        record |= {"tied_groups": 0.25, "flops_saved": 0.3, "cpu_s": 90.0, "tree_saving": 1.52}
    if family == "elsewhere":
        far = {"sft": 0.2, "nonlinear": 0.3}.get(method, 0.1)
        record["tests"] = {name: {"miou": far, "r1@0.5": far, "parse_rate": 1.0} for name in plan.TESTS}
    if family == "hybrid":
        record["evaluations"]["think"] = scores
        record["oracle_of_both"] = scores[-1]
        record["format_reward"] = {"mean": [0.0, 1.0]}
    return record


MIOU = {"sft": 0.3, "grpo": 0.2, "mixed": 0.25, "downscale": 0.25, "anchor": 0.2, "nonlinear": 0.3, "orarl": 0.3}


@pytest.fixture
def results():
    """Three seeds of every run; nonlinear beats anchor, and GRPO falls short of mixed, by about 5 and 10 points."""
    runs = {}
    for run in plan.planned_runs(1e-4):
        if run.seed < 3:
            miou = MIOU.get(run.method, 0.3) + 0.01 * run.seed
            fields = {"num_generations": run.num_generations, "num_videos": run.num_videos, "noise": run.noise}
            runs[run.name] = run_record(run.family, run.method, run.seed, miou, **fields)
    return {
        "planned": 1000, "done": len(runs), "num_queries": 1000, "cold_starts": {},
        "constant_span": {"span": [1.0, 2.0], "miou": 0.1, "r1@0.7": 0.0}, "runs": runs,
    }  # fmt: skip


def test_runs_have_names_of_their_own_and_flags_that_the_trainer_takes():
    runs = [*plan.pilot_runs(), *plan.planned_runs(1e-4)]
    assert len({run.name for run in runs}) == len(runs)
    for run in (run for run in runs if run.seed in (0, plan.PILOT_SEED)):
        files = {"annotations": "train.json", "eval_annotations": "test.json", "videos": "videos", "model": "start"}
        config = parse_args(plan.words({**run.flags, **files, "seed": run.seed}))
        assert config.rollout.num_generations == run.num_generations
        train = config.train
        assert (config.algorithm.beta, train.gradient_accumulation_steps, train.adam_beta2) == (0, 1, 0.95)


def test_methods_differ_in_nothing_but_method_rule_and_phases():
    core = [run for run in plan.planned_runs(1e-4) if run.family == "core" and run.seed == 0]
    assert [run.method for run in core] == list(plan.METHODS)
    for run in core:
        assert {name: value for name, value in run.flags.items() if name not in ("phases", "shaping")} == {
            "num_generations": plan.CORE_GROUP_SIZE
        }
        assert run.flags.get("shaping", run.method) == run.method
    steps = {tuple(entry.split(":")[1] for entry in str(run.flags["phases"]).split(",")) for run in core}
    assert len(steps) == 1


def test_tree_runs_differ_in_the_queries_of_a_video_alone():
    one, four = ({**run.flags} for run in plan.planned_runs(1e-4) if run.family == "tree" and run.seed == 0)
    assert (one.pop("queries_per_video"), four.pop("queries_per_video")) == (1, 4) and one == four
    assert plan.PROMPTS_PER_STEP % 4 == 0


def test_some_families_alone_are_made_once_the_pilots_are_in(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(Campaign, "_prepare_data", lambda self, num_workers: None)
    monkeypatch.setattr(Campaign, "make_runs", lambda self, runs, num_workers: made.extend(run.family for run in runs))
    campaign = Campaign(tmp_path / "work", tmp_path / "results.json")
    with pytest.raises(ValueError, match="--only tree: the pilots"):
        campaign.make(1, ["tree"])
    for run in plan.pilot_runs():
        campaign.results["runs"][run.name] = run_record("pilot", run.method, run.seed, 0.2, rate=run.rate)
    campaign.make(1, ["tree", "pruning"])
    assert set(made) == {"tree", "pruning"} and len(made) == 4 * len(plan.SEEDS)
    with pytest.raises(ValueError, match=r"rate of pilots, not 0\.0003"):
        campaign.make(1, ["tree"], 3e-4)
    made.clear()
    given = Campaign(tmp_path / "work", tmp_path / "given.json")
    with pytest.raises(ValueError, match="--only tre: no such runs"):
        given.make(1, ["tre"], 3e-4)
    given.make(1, ["core/grpo", "rare_hits"], 3e-4)
    assert given.results["rate"] == 3e-4 and set(made) == {"core", "rare hits"} and len(made) == 5 * len(plan.SEEDS)


def test_evidence_runs_ask_for_other_starts_truths_and_tests():
    """Over the core's, which they otherwise repeat."""
    runs = [run for run in plan.planned_runs(1e-4) if run.seed == 0]
    core = {run.method: run.flags for run in runs if run.family == "core"}
    of = {family: [run for run in runs if run.family == family] for family in ("elsewhere", "noise", "rare hits")}
    assert [len(found) for found in of.values()] == [4, 6, 4]
    for run in (run for found in of.values() for run in found if run.method != plan.START):
        assert run.flags == core[run.method]
    assert {run.start for run in of["rare hits"]} == {"rare"} and {run.noise for run in of["noise"]} == {*plan.NOISE}
    assert all(run.tests == tuple(plan.TESTS) and run.start == "cold" for run in of["elsewhere"])


def test_spans_with_errors_stay_spans_in_their_videos():
    spans = [span for _ in range(200) for span in ([0.0, 1.0], [4.0, 6.0], [8.5, 10.0])]
    given = {"a": {"duration": 10.0, "timestamps": spans, "sentences": []}}
    changed = jittered(given, 0.3)["a"]["timestamps"]
    assert all(0 <= start < end <= 10 for start, end in changed) and given["a"]["timestamps"][1] == [4.0, 6.0]
    assert np.std([span[0] for span in changed[1::3]]) == pytest.approx(0.3 * 2, rel=0.15)
    assert jittered(given, 0.3) == jittered(given, 0.3) and jittered(given, 0.0) == given


def test_evidence_is_told_for_families_that_have_runs(results):
    text = "\n".join(evidence(results))
    assert "| nonlinear > sft | 3 | +10.0 ± 0.0 | holds |" in text and "| grpo keeps thinking | 3 |" in text
    assert "| 30 | 31.0 ± 2.5 | 21.0 ± 2.5 | 31.0 ± 2.5 | -10.0 ± 0.0 | reversed |" in text
    assert "5.0 % of the answers that GRPO samples" in text and "| mixed | 3 |" in text
    results["runs"] = {}
    assert evidence(results) == ["", "", ""]


def test_a_start_lies_there_whole_and_as_it_was_or_is_not_taken(tmp_path, monkeypatch):
    made = []

    def train(self, folder, data, flags):
        made.append(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 30, "phase": "eval", "eval/answer/miou": 0.2}) + "\n")
        (folder / "summary.json").write_text("{}")
        return {"cpu_s": 1.0}

    monkeypatch.setattr(Campaign, "_train", train)
    monkeypatch.setattr("bench.paper.campaign.latest_checkpoint", lambda folder: (folder / "checkpoints/step", {}))
    campaign = Campaign(tmp_path, tmp_path / "results.json")
    campaign.data = {"easy": tmp_path, "hard": tmp_path}
    model = campaign._start("cold", 0)
    assert model == campaign._start("cold", 0) == tmp_path / "cold_start/seed0/checkpoints/step/model"
    assert made == ["base", "seed0"] and campaign.results["cold_starts"]["0"]["miou"] == 0.2
    (tmp_path / "base/summary.json").unlink()  # stopped on its way
    campaign._start("rare", 0)
    assert made[2:] == ["base", "seed0"] and "rare 0" in campaign.results["cold_starts"]
    campaign.results["cold_starts"]["0"]["miou"] = 0.3
    with pytest.raises(ValueError, match="start '0' came out with"):
        campaign._start("cold", 0)


def test_two_campaigns_write_to_one_file(tmp_path):
    first, second = (Campaign(tmp_path / name, tmp_path / "results.json") for name in ("a", "b"))
    for campaign, name in ((first, "of a"), (second, "of b")):
        campaign.results["runs"][name] = {}
        campaign._write()
    kept = read_results(tmp_path / "results.json")
    assert set(kept["runs"]) == {"of a", "of b"} and kept["done"] == 2


def test_the_rate_is_the_one_at_which_all_pilots_do_best_on_average():
    scores = {(1e-4, "grpo"): 0.3, (1e-4, "mixed"): 0.2, (3e-4, "grpo"): 0.1, (3e-4, "mixed"): 0.45}
    runs = {
        f"{rate}{method}": run_record("pilot", method, 100, miou, rate=rate) for (rate, method), miou in scores.items()
    }
    runs["core"] = run_record("core", "grpo", 0, 0.9, rate=1e-4)
    assert best_rate(runs) == 3e-4


def test_a_difference_is_paired_by_seed_and_its_interval_decides():
    first = {seed: run_record("core", "a", seed, 0.3 + 0.1 * seed) for seed in range(3)}
    second = {seed: run_record("core", "b", seed, 0.2 + 0.1 * seed) for seed in range(1, 4)}
    difference = paired(first, second, lambda record: record["evaluations"]["answer"][-1]["miou"])
    assert (difference.mean, difference.half_width) == pytest.approx((0.1, 0.0))
    assert verdict(difference) == "holds"
    assert verdict(Interval(-0.1, 0.05)) == "reversed"
    assert verdict(Interval(0.1, 0.2)).startswith("open")
    assert paired({0: first[0]}, {0: first[0]}, len) is None and verdict(None) == "too few runs"


def test_steps_to_a_score_lie_on_straight_lines():
    record = run_record("core", "a", 0, 0.3)
    assert steps_to_reach(record, 0.25) == pytest.approx(60)
    assert steps_to_reach(record, 0.05) == 0 and steps_to_reach(record, 0.5) is None


def test_core_runs_serve_as_their_group_size(results):
    assert of_group_size(results, "grpo", plan.CORE_GROUP_SIZE) == records(results, "core", "grpo")
    assert len(of_group_size(results, "grpo", 8)) == 3


def test_summary_states_every_ordering_and_that_it_is_partial(results):
    text = summarise(results)
    assert f"**Partial: {results['done']} of 1000" in text and "c0ffee" in text
    assert "nonlinear > anchor: holds" in text and "grpo > mixed: reversed" in text
    assert "| nonlinear > anchor | 3 | +10.0 ± 0.0 |" in text
    assert text.count("\n## ") == 7
    assert "| orarl of 9, half pruned | 3 | 31.0 ± 2.5 | 31.0 ± 2.5 | 25.0 | 30.0 | 1.52 | 90.0 | +0.0 ± 0.0 |" in text
    assert "| nonlinear, 4 queries a video | 3 |" in text
    assert "| grpo, Wasserstein | 3 |" in text and "| +10.0 ± 0.0 | +10.0 ± 0.0 | holds |" in text
    del results["runs"]["core/anchor/seed0"], results["runs"]["core/anchor/seed1"]
    assert "nonlinear > anchor: too few runs" in summarise(results)


def test_summary_and_figures_of_a_campaign_just_begun(results, tmp_path):
    results["runs"] = {}
    assert "too few runs" in summarise(results)
    assert draw(results, tmp_path / "paper.json") == []


def test_figures_are_drawn(results, tmp_path):
    files = draw(results, tmp_path / "paper.json")
    assert len(files) == 3 and all(file.stat().st_size > 5000 for file in files)


def test_results_of_other_code_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(ValueError, match="no results yet"):
        read_results(path)
    path.write_text(json.dumps({"settings": {"stages": "a"}}))
    with pytest.raises(ValueError, match="its runs have stages 'a', this checkout has 'b'"):
        check_same_settings(path, read_results(path)["settings"], {"stages": "b"})
    check_same_start("base", None, {"miou": 0.1})
    check_same_start("base", {"miou": 0.1, "cpu_s": 3}, {"miou": 0.1, "of_later": 0})
    with pytest.raises(ValueError, match=r"start 'base' came out with \{'miou': 0.2\}"):
        check_same_start("base", {"miou": 0.1, "cpu_s": 3}, {"miou": 0.2})


def test_record_of_a_run(tmp_path):
    """Two groups of two sampled answers and the true one; a hit has an IoU of at least 0.5."""
    metrics = [{"step": 0, "phase": "eval", "eval/answer/miou": 0.1}]
    metrics += [{"step": 0, "phase": "tempsamp/think", "reward/format": 0.5, "advantage/skew/mixed": 2.0}]
    metrics += [{"step": 1, "phase": "tempsamp/answer", "advantage/skew/mixed": 1.0}]
    metrics += [{"step": 2, "phase": "eval", "eval/answer/miou": 0.3}]
    off = {"is_off_policy": [False, False, True], "advantages": [-0.5, -0.5, 1.0]}
    groups = [
        {"step": step, "rewards": {"tiou": rewards}, **off} for step, rewards in enumerate([[0, 0.6, 1], [0, 0, 1]])
    ]
    for name, rows in (("metrics", metrics), ("groups", groups * 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = record_of(tmp_path)
    assert record["evaluations"] == {"answer": [{"step": 0, "miou": 0.1}, {"step": 2, "miou": 0.3}]}
    assert record["rewards"]["groups_without_a_hit"] == 0.5 and record["rewards"]["hits"]["first_quarter"] == 0.5
    assert record["rewards"]["best_of_group"]["mean"] == [0.6, 0.6, 0, 0]
    assert record["advantages"]["mean"] == {"on_policy": -0.5, "off_policy": 1.0}
    assert sum(record["advantages"]["histogram"]["off_policy"]) == 4
    assert record["skewness_by_rule"] == {"mixed": 1.5} and record["format_reward"]["mean"] == [0.5]

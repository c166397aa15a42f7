"""Recipes say what was published, every published row has its recipe, and the two agree."""

from __future__ import annotations

import re

import pytest

from tempsamp_fast.arguments import RECIPES, parse_args
from tempsamp_fast.config import parse_phases
from tempsamp_fast.data.catalogue import DATASETS
from tempsamp_fast.evaluation.published import METRICS, Published, comparison, published_results

OURS = {"TempSamp-R1": "tempsamp", "SFT": "sft", "GRPO": "grpo"} | dict.fromkeys(
    ("mixed", "downscale", "anchor", "nonlinear"), "tempsamp"
)
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != "tiny_cpu")
ROWS = [row for row in published_results() if row.recipe]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_carries_its_published_figures_and_no_others(name: str) -> None:
    lines = re.findall(r"^# Published: (.+)$", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE)
    rows = [row.describe() for row in ROWS if row.recipe == name]
    assert lines == rows or (not rows and len(lines) == 1 and not re.search(r"\d\d", lines[0]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.recipe}-{row.mode}{row.flags}")
def test_a_recipe_repeats_its_published_row(row: Published) -> None:
    config = parse_args(["--config", str(row.recipe), *row.flags.split()])
    method, _, group_size = row.method.partition(" of ")
    assert {phase.method for phase in parse_phases(config.train.phases)} == {OURS[method]}
    assert config.data.eval_annotations == row.test
    few_shot = re.fullmatch(r"(\d+) videos", row.train or "")
    assert config.data.few_shot_videos == (int(few_shot[1]) if few_shot else None)
    if row.train in DATASETS:
        assert config.data.annotations == row.train and config.data.eval_videos
    if method in ("mixed", "downscale", "anchor", "nonlinear"):
        assert config.algorithm.shaping == method
    assert config.rollout.num_generations == int(group_size or (8 if row.recipe == "charades_qwen2_5_vl_7b" else 4))
    assert row.mode in (*config.train.eval_modes.split("+"), "mixed", "-")
    assert config.train.output_dir == f"runs/{row.recipe}"


def test_published_rows_are_whole() -> None:
    for row in published_results():
        assert row.test in DATASETS and row.metrics and row.metrics.keys() <= METRICS.keys()
        assert row.recipe is None or row.recipe in NAMES


def test_the_comparison_shows_the_main_rows_of_the_data_set_or_all() -> None:
    ours = [
        {
            "mode": "answer",
            "protocol": "paper",
            "miou": 0.5,
            "r1@0.3": 0.6,
            "r1@0.5": 0.4,
            "r1@0.7": 0.25,
            "parse_rate": 1.0,
        }
    ]
    short = comparison(ours, 10, "charades-test")
    assert "ours                          answer       50.0     60.0     40.0     25.0    100.0" in short
    assert "VideoChat-R1" in short and "52.4" not in short and "50 videos" not in short
    assert "TempSamp-R1 (50 videos)" in comparison(ours, 10, "charades-test", tables=None)
    assert "published" not in comparison(ours, 10, None)

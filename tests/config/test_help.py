"""Settings explain themselves: `--help`, what was meant by a slip, and where a recipe's error stands."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from tempsamp_fast.arguments import FIELDS, SECTIONS, parse_args
from tempsamp_fast.config.recipe import RECIPES
from tempsamp_fast.rewards import REWARDS

PURE_NUMBERS = {
    *("few_shot_seed", "draw_seed", "seed", "local_rank"),
    *("random_crop", "warmup_ratio", "vllm_memory", "top_p", "downscale", "tau", "prune_ratio"),  # shares
    *("lora_alpha", "temperature", "alpha_1", "alpha_2", "lambda_off", "format_weight"),  # factors
    *("epsilon_low", "epsilon_high", "delta", "dual_clip"),  # ratios
    *("learning_rate", "weight_decay", "adam_beta2", "max_grad_norm"),
}
OF_THE_PAPER = {
    *("shaping", "tau", "alpha_1", "alpha_2", "lambda_off", "downscale", "beta", "cot_off_policy", "format_weight"),
    *("num_generations", "temperature", "top_p", "max_completion_length", "learning_rate", "off_policy_ratio"),
    *("fps", "max_frames", "min_pixels", "max_pixels", "total_pixels", "gradient_accumulation_steps"),
    *("prompts_per_device", "zero_stage", "offload"),
}
EVERY = [(field, get_type_hints(section)[field.name]) for section in SECTIONS for field in fields(section)]


@pytest.mark.parametrize(("field", "type_"), EVERY, ids=[field.name for field, _ in EVERY])
def test_every_setting_says_what_it_is_its_unit_and_its_source(field: Any, type_: Any) -> None:
    meaning = field.metadata["help"]
    assert len(meaning.split()) >= 3, "more than a word or two"
    assert "%" not in meaning, "argparse formats it"
    is_number = {int, float} & {type_, *get_args(type_)}
    if is_number:
        assert (field.name in PURE_NUMBERS) != bool(re.search(r"\[[a-zA-Z/ -]+\]", meaning))
    assert (field.name in OF_THE_PAPER) <= bool(re.search(r"\(.*paper.*\)", meaning))


def test_the_rewards_of_the_package_are_named() -> None:
    named = set(re.findall(r"\w+", FIELDS["rewards"].metadata["help"]))
    assert {name for name in REWARDS if not name.endswith("format")} <= named


def test_help_is_in_groups_with_every_flag_once_and_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^(\w+): .*:$", text, re.MULTILINE)
    assert titles == [section.__name__.removesuffix("Config").lower() for section in SECTIONS]
    shown = re.findall(r"^  (--[a-z_0-9]+)", text, re.MULTILINE)
    assert {f"--{field.name}" for field, _ in EVERY} <= set(shown) and len(shown) == len(set(shown))
    assert not re.search(r"^  --\w+-\w+", text, re.MULTILINE)
    words = " ".join(text.split())
    assert all(path.stem in words for path in RECIPES.glob("*.yaml"))
    assert max(map(len, text.splitlines())) <= 200


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--learning_rat", "1e-5"], "--learning_rate"),
        (["--num-generation=8"], "--num_generations"),
        (["--shaping", "nonlinea"], "nonlinear"),
        (["--phases", "tempsam:3"], "tempsamp"),
        (["--phases", "sft/thnk:3"], "think"),
        (["--config", "tiny_cpuu"], "tiny_cpu"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(words: list[str], meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        parse_args(words)


def test_an_unknown_recipe_is_answered_with_the_list() -> None:
    with pytest.raises(ValueError, match="no recipe; choose from") as caught:
        parse_args(["--config", "nothing"])
    assert all(path.stem in str(caught.value) for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("learning_rat: 1e-5", "unknown setting 'learning_rat'; did you mean 'learning_rate'"),
        ("seed: many", "--seed.*'many'"),
        ("beta: -0.5", "beta=-0.5: must be zero or more"),
        ("shaping: linear", "--shaping.*'linear'"),
        ("phases: tempsam:3", "phases: method 'tempsam'"),
        ("allow_pickle: true", "allow_pickle counts only when typed"),
        ("base: nowhere/x", "base 'nowhere/x' is no name"),
        ("fps: 2", "fps comes twice, as on line 1"),
        ("a: [", "not valid YAML"),
    ],
)
def test_an_error_of_a_recipe_names_its_line(tmp_path: Path, line: str, named: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"fps: 1\n# a comment\n\n{line}\n")
    place = "" if "YAML" in named else "line 4: "
    with pytest.raises(ValueError, match=f"mine.yaml: {place}.*{named}") as caught:
        parse_args(["--config", str(file)])
    assert "line" in str(caught.value)


def test_what_is_typed_is_not_blamed_on_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("beta: 0.1\n")
    with pytest.raises(ValueError, match=r"^beta=-1.0"):
        parse_args(["--config", str(file), "--beta", "-1"])


def test_of_several_recipes_later_ones_win_and_flags_over_all(tmp_path: Path) -> None:
    for name, text in (("one", "fps: 1\nseed: 1\nbeta: 0.1\n"), ("two", "seed: 2\nbeta: 0.2\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    one, two = str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")
    for words in (["--config", one, two, "--beta=0.3"], ["--beta=0.3", "--config", one, "--config", two]):
        config = parse_args(words)
        assert (config.data.fps, config.train.seed, config.algorithm.beta) == (1.0, 2, 0.3)
    assert parse_args(["--config", two, one]).train.seed == 1
    (tmp_path / "one.yaml").write_text("seed: 1\nfps: -1\n")
    with pytest.raises(ValueError, match=r"one\.yaml: line 2: fps=-1"):
        parse_args(["--config", one, two])

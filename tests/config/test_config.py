"""Settings: what can be written, what wins, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempsamp_fast.arguments import parse_args, settings_table
from tempsamp_fast.config import Phase, TrainConfig, parse_phases
from tempsamp_fast.model.families import FAMILIES


def test_phases_are_read_in_order_with_answer_as_the_default_mode() -> None:
    assert parse_phases("sft:300, tempsamp/think:150,grpo/answer+think:7@2e-5") == [
        Phase("sft", ("answer",), 300),
        Phase("tempsamp", ("think",), 150),
        Phase("grpo", ("answer", "think"), 7, learning_rate=2e-5),
    ]
    assert parse_phases("sft:1epoch,grpo/think:0.5epochs@2e-5") == [
        Phase("sft", ("answer",), 0, num_epochs=1.0),
        Phase("grpo", ("think",), 0, learning_rate=2e-5, num_epochs=0.5),
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sft", "'sft' is not method"),
        ("", "'' is not method"),
        ("sft:10,", "'' is not method"),
        ("ppo:10", "'ppo'.*choose from sft, grpo, tempsamp"),
        ("sft/loud:10", "'loud'.*choose from answer, think"),
        ("sft:0", "'sft:0' has no steps"),
        ("sft:0epochs", "'sft:0epochs' has no steps"),
        ("sft:1.5", "'sft:1.5' is not method"),
        ("sft:-1", "'sft:-1' is not method"),
        ("sft:3@fast", "'sft:3@fast' is not method"),
        ("sft:3@0", "has a learning rate of 0"),
        ("sft:3@1e999", "has a learning rate of inf"),
        ("sft:3@1.2.3", "'sft:3@1.2.3' is not method"),
    ],
)
def test_a_malformed_phase_is_named_with_the_choices(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"phases: .*{named}"):
        parse_args([f"--phases={text}"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("fps", "0"),
        ("fps", "nan"),
        ("min_frames", "0"),
        ("min_frames", "10000"),
        ("max_pixels", "0"),
        ("max_eval_samples", "-1"),
        ("video_cache_gib", "-1"),
        ("num_generations", "1"),
        ("temperature", "0"),
        ("top_p", "1.5"),
        ("top_k", "-1"),
        ("max_completion_length", "0"),
        ("tau", "0"),
        ("alpha_1", "0"),
        ("alpha_2", "-1"),
        ("beta", "-0.1"),
        ("beta", "nan"),
        ("epsilon_low", "1"),
        ("epsilon_high", "-0.1"),
        ("delta", "1.1"),
        ("updates_per_batch", "0"),
        ("prompts_per_device", "0"),
        ("sft_prompts_per_device", "0"),
        ("gradient_accumulation_steps", "0"),
        ("max_tokens_per_row", "0"),
        ("learning_rate", "0"),
        ("learning_rate", "inf"),
        ("warmup_ratio", "1.1"),
        ("weight_decay", "-1"),
        ("max_grad_norm", "-1"),
        ("save_steps", "-1"),
        ("keep_checkpoints", "0"),
        ("eval_batch_size", "0"),
        ("eval_modes", "answer+loud"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_with_the_rule(flag: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag}=.+: must be "):
        parse_args([f"--{flag}={value}"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning_rat", "1e-5"], "--learning_rat"),
        (["--shaping", "linear"], "--shaping.*'linear'.*nonlinear.*orarl"),
        (["--zero_stage", "4"], "--zero_stage.*'4'"),
        (["--fps", "fast"], "--fps.*'fast'"),
        (["--seed", "1.5"], "--seed.*'1.5'"),
        (["--seed"], "--seed"),
        (["--config"], "--config"),
        (["--config", "missing.yaml"], "missing.yaml: no such file, and no recipe"),
        (["--resume", "nowhere"], "nowhere: no run"),
        (["--annotations", "mine.json"], "videos=None"),
        (["--record_rollouts", "a", "--replay_rollouts", "b"], "record_rollouts='a'"),
        (["--cuda_graphs=true", "--rollout_backend=vllm"], "cuda_graphs=True.*False with rollout_backend='vllm'"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(words: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_args(words)


def test_a_yaml_file_counts_as_flags_typed_first(tmp_path: Path) -> None:
    """Numbers are converted as on the command line (YAML itself takes 1e-5 for a text), and typed flags win."""
    file = tmp_path / "mine.yaml"
    file.write_text("learning_rate: 1e-5\nseed: 3\nfreeze-vision: true\ndelta: null\nphases: 'sft:1,grpo:2'\n")
    config = parse_args(["--seed", "4", "--config", str(file)])
    assert config.train.learning_rate == 1e-5
    assert config.train.seed == 4
    assert config.model.freeze_vision is True
    assert config.algorithm.delta is None
    assert config.train.phases == "sft:1,grpo:2"
    assert config.data.fps == 2.0


def test_a_recipe_is_its_base_with_its_own_settings_over_it(tmp_path: Path) -> None:
    """The base may be a file beside it or one of the recipes that come with the package."""
    (tmp_path / "mine.yaml").write_text("base: tiny_cpu\nseed: 3\nbeta: 0.1\n")
    (tmp_path / "variant.yaml").write_text("base: mine\nseed: 4\nadam_beta2: null\n")
    config = parse_args(["--config", str(tmp_path / "variant.yaml"), "--fps", "1"])
    assert (config.train.seed, config.algorithm.beta, config.data.fps) == (4, 0.1, 1.0)
    assert config.train.phases == parse_args([]).train.phases
    assert config.train.adam_beta2 == TrainConfig().adam_beta2


@pytest.mark.parametrize(
    ("base", "named"), [("b", "b.yaml: line 1: base 'a' leads back to itself"), ("gone", "gone.yaml: No such file")]
)
def test_a_base_that_is_none_is_named(tmp_path: Path, base: str, named: str) -> None:
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    with pytest.raises(ValueError, match=named):
        parse_args(["--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1e-5", "line 1: unknown setting 'learning_rat'"),
        ("train: {seed: 1}", "line 1: unknown setting 'train'"),
        ("seed: many", "--seed.*'many'"),
        ("beta: -0.5", "beta=-0.5"),
        ("a: [", "not valid YAML"),
        ("just words", "expected `name: value` lines, found str"),
    ],
)
def test_a_wrong_yaml_entry_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=named):
        parse_args(["--config", str(file)])


def test_recipes_are_found_by_name_and_every_one_parses() -> None:
    recipes = (Path(__file__).parents[2] / "tempsamp_fast/configs").glob("*.yaml")
    names = [recipe.stem for recipe in recipes]
    assert "tiny_cpu" in names
    for name in names:
        if name == "tiny_cpu":
            assert parse_args(["--config", name]) == parse_args([])
        else:
            parse_args(["--config", name, "--annotations", "a.json", "--videos", "v"])


def test_resuming_starts_from_the_settings_of_the_run(tmp_path: Path) -> None:
    """All of them come back as they were, and flags typed with --resume win."""
    started = parse_args(["--learning_rate=3e-7", "--phases=sft:1", "--freeze_vision", "--output_dir", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(started.as_dict()))
    resumed = parse_args(["--resume", str(tmp_path), "--phases=sft:5"])
    assert resumed.train.resume == str(tmp_path)
    expected = started.as_dict()
    expected["train"] |= {"resume": str(tmp_path), "phases": "sft:5"}
    assert resumed.as_dict() == expected


def test_the_table_of_settings_is_the_one_in_the_docs() -> None:
    """`python -m tempsamp_fast.arguments > docs/settings.md` writes it; every setting has its meaning there."""
    assert (Path(__file__).parents[2] / "docs/settings.md").read_text() == settings_table()
    assert "|  |" not in settings_table()


@pytest.mark.parametrize("words", [["--dry_run", "True"], []])
def test_an_unknown_tiny_family_is_refused_before_anything_is_made(words: list[str], tmp_path: Path, refused) -> None:
    line = refused([*words, "--tiny_family", "llava", "--output_dir", str(tmp_path / "run")])
    assert line == f"tiny_family='llava': choose from {', '.join(FAMILIES)}"
    assert not (tmp_path / "run").exists()

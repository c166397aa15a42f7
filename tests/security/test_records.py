"""Settings that a stranger wrote: the record of a run that is resumed, recipes, and what is typed all the same."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.arguments import FIELDS, RUNS_CODE, SECTIONS, TYPED_AGAIN, parse_args
from tempsamp_fast.config import Phase
from tempsamp_fast.run.schedule import first_reinforcement_step, plan


def recorded(folder: Path, section: str = "model", **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({section: settings}))
    return folder


ASKED = {
    "allow_pickle": (True, 1, "yes"),
    "trust_remote_code": (True, "true"),
    "record_rollouts": ("/elsewhere/kept",),
    "patch_cache": ("/elsewhere/kept",),
    "synthetic_dir": ("/elsewhere/kept",),
    "rewards": ("/elsewhere/evil.py:f=1", "tiou=1,evil.py:f", ["evil.py:f"], {"evil": 1}),
    "prompt_file": ("/elsewhere/prompts.yaml",),
    "deepspeed_config": ("/elsewhere/ds.json", "../../../ds", ["zero2"]),
    "video_device": ("cuda",),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ASKED.items() for value in values])
def test_a_record_allows_no_code_writes_nowhere_and_picks_no_device(tmp_path: Path, name: str, value: Any) -> None:
    """In whichever section it says so; the error names the flag, and typed it counts."""
    assert ASKED.keys() == set(TYPED_AGAIN)
    for section in ("model", "train", "anything"):
        run = recorded(tmp_path / "run", section, **{name: value})
        with pytest.raises(ValueError, match=f"--{name}.*counts only when typed again"):
            parse_args(["--resume", str(run)])
    typed = {"allow_pickle": "true", "trust_remote_code": "true", "video_device": "cpu"}.get(name, "mine")
    for words in ([f"--{name}", typed], [f"--{name}={typed}"], [f"--{name.replace('_', '-')}={typed}"]):
        parse_args(["--resume", str(recorded(tmp_path / "run", model="tiny")), *words])


def test_rewards_of_a_file_count_only_when_typed(tmp_path: Path) -> None:
    """Those of the package count in records and recipes too."""
    assert parse_args(["--resume", str(recorded(tmp_path / "run", "algorithm", rewards="tiou=2"))]).algorithm.rewards
    for text in ("seed: 1\nrewards: evil.py:f=1\n", "base: evil\n"):
        (tmp_path / "evil.yaml").write_text("rewards: tiou,../evil.py:f\n")
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"line \d: rewards counts only when typed"):
            parse_args(["--config", str(tmp_path / "mine.yaml")])
    (tmp_path / "mine.yaml").write_text("rewards: tiou=2,multi_tiou=1\n")
    assert parse_args(["--config", str(tmp_path / "mine.yaml")]).algorithm.rewards == "tiou=2,multi_tiou=1"


def test_no_code_of_a_run_folder_is_run(tmp_path: Path) -> None:
    """Not for its report, and not for what its record says."""
    from tempsamp_fast.report.figures import task_rewards
    from tempsamp_fast.report.runs import own_rewards, read_runs

    run = recorded(tmp_path / "run")
    (run / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    sections = {"data": {"task": "grounding"}, "train": {"seed": 0}, "algorithm": {"rewards": f"{run}/evil.py:f=2"}}
    (run / "config.json").write_text(json.dumps(sections))
    group = {"step": 0, "phase": "grpo", "rewards": {"f": [0.5]}, "advantages": [0.0], "is_off_policy": [False]}
    (run / "groups.jsonl").write_text(json.dumps(group) + "\n")
    (run / "metrics.jsonl").write_text("")
    (found,) = read_runs([run])
    assert task_rewards(found.groups[0], own_rewards(found)) == [1.0]
    assert not (tmp_path / "ran").exists()


def test_what_a_record_changes_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = recorded(tmp_path / "run", "data", videos="/elsewhere", annotations="a\x1b[31m.json", fps=2.0)
    with caplog.at_level("INFO"):
        parse_args(["--resume", str(run)])
    assert "videos='/elsewhere'" in caplog.text and "fps" not in caplog.text and "\x1b" not in caplog.text


def test_the_hub_is_not_asked_for_a_model_that_only_a_record_names(tmp_path: Path) -> None:
    run = str(recorded(tmp_path / "run", model="someone/model", offline=False))
    assert parse_args(["--resume", run]).model.offline
    assert not parse_args(["--resume", run, "--model", "someone/model"]).model.offline
    assert not parse_args(["--model", "someone/model"]).model.offline


@pytest.mark.parametrize("name", RUNS_CODE)
@pytest.mark.parametrize("door", ["itself", "its base"])
def test_a_recipe_allows_no_code(tmp_path: Path, name: str, door: str) -> None:
    (tmp_path / "evil.yaml").write_text(f"{name}: true\n")
    (tmp_path / "mine.yaml").write_text("base: evil\n")
    recipe = tmp_path / ("evil.yaml" if door == "itself" else "mine.yaml")
    with pytest.raises(ValueError, match=f"{name} counts only when typed"):
        parse_args(["--config", str(recipe)])


@pytest.mark.parametrize("base", ["../outside", "/etc/outside", "a/b", 7])
def test_a_recipe_names_no_file_elsewhere(tmp_path: Path, base: Any) -> None:
    (tmp_path / "outside.yaml").write_text("seed: 7\n")
    recipe = tmp_path / "inner/mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text(json.dumps({"base": base}))
    with pytest.raises(ValueError, match="no name of a recipe"):
        parse_args(["--config", str(recipe)])


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize("text", [LAUGHS, "a: &a [*a]", "[" * 20_000, "seed: " + "9" * 10_000, "a: {" * 5000])
def test_a_recipe_cannot_be_a_bomb(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "bomb.yaml"
    recipe.write_text(text)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"bomb\.yaml: not valid YAML"):
        parse_args(["--config", str(recipe)])
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "{", "[]", "null", '{"data": 3}'])
def test_a_record_cannot_be_a_bomb(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        parse_args(["--resume", str(tmp_path)])


HOSTILE = [
    "x\x1b[31m",
    "../../etc/passwd",
    "--allow_pickle",
    -1,
    0,
    10**12,
    10**400,
    1e308,
    True,
    None,
    [],
    [[1]],
    {"a": 1},
]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_record_of_anything_is_one_line(tmp_path: Path, section: type) -> None:
    """Every setting with values of every kind: taken as a setting of this run, or an error; never another setting."""
    for index, field in enumerate(fields(section)):
        for value in HOSTILE[index % 4 :: 4]:
            run = recorded(tmp_path / "run", **{field.name: value})
            try:
                config = parse_args(["--resume", str(run)])
            except ValueError as error:
                assert len(str(error)) < 1000, (field.name, value)
                continue
            others = {name: each for part in config.as_dict().values() for name, each in part.items()}
            changed = {name for name, each in others.items() if each != FIELDS[name].default}
            assert changed <= {field.name, "resume", "offline"}, (field.name, value)


def test_a_record_cannot_count_forever(tmp_path: Path) -> None:
    """Phases of more steps than anyone takes, and the steps of a run that is far on."""
    for phases in ("sft:99999999999", "sft:" + "9" * 5000, "sft:9999999999epochs", "sft:" + "9" * 400 + "epochs"):
        with pytest.raises(ValueError, match="phases: "):
            parse_args(["--resume", str(recorded(tmp_path / "run", "train", phases=phases))])
    phases = [Phase("sft", ("answer",), 999_999_999), Phase("grpo", ("answer",), 999_999_999)]
    started = time.process_time()
    assert first_reinforcement_step(phases) == 999_999_999
    assert next(plan(phases, 1_999_999_000)).step_in_phase == 999_999_001
    assert time.process_time() - started < 1
    with pytest.raises(ValueError, match="each at most"):
        parse_args(["--synthetic_videos", "999999999,1,1"]).data.num_synthetic_videos()

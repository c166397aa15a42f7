"""Settings read from command line words, recipe files and the record of an earlier run.

`python -m tempsamp_fast.arguments > docs/settings.md` writes the table of all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from tempsamp_fast.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from tempsamp_fast.system.files import read_json

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent / "configs"
SECTIONS = (DataConfig, ModelConfig, RolloutConfig, AlgorithmConfig, TrainConfig)
MOST_CHARACTERS = 1 << 16
"""Of a recipe."""
RUNS_CODE = ("allow_pickle", "trust_remote_code")
"""Settings that count only when typed on the command line."""
TYPED_AGAIN = (*RUNS_CODE, "record_rollouts", "patch_cache", "synthetic_dir", "deepspeed_config", "video_device")
"""Those that must be typed again to resume: the record may be a stranger's, and these run, write or open something."""
FIELDS: dict[str, Any] = {
    name: field
    for section in SECTIONS
    for field in dataclasses.fields(section)
    for name in (field.name, *(alias.removeprefix("--") for alias in field.metadata["aliases"]))
}
"""By their names, former ones too."""
DESCRIPTION = """--config NAME_OR_FILE.yaml takes the settings of a recipe first, in place of the defaults below; flags
win. Without it that is tiny_cpu for the tiny model on the embedded data, else own_videos. --resume RUN takes those the
run was started with."""


def read_recipe(path: Path, inherited_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a flat YAML file, over those of the recipe that its entry `base` names, if it has one.

    A base is a file's stem in the same folder, or a recipe's name. Raises ValueError naming a file that cannot be read,
    a base that leads back to itself, and a setting that counts only when typed.
    """
    try:
        with path.open() as recipe:
            text = recipe.read(MOST_CHARACTERS)
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2 or isinstance(event, yaml.AliasEvent) or len(text) == MOST_CHARACTERS:
                raise ValueError(f"aliases, nesting and {MOST_CHARACTERS} characters are too much for `name: value`")
        entries = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--config {path}: expected `name: value` lines, found {type(entries).__name__}")
    if always := [name for name in RUNS_CODE if entries.get(name)]:
        raise ValueError(f"--config {path}: {', '.join(always)} counts only when typed: --{' --'.join(always)}")
    if "base" not in entries:
        return entries
    base = entries.pop("base")
    if Path(str(base)).name != base:
        raise ValueError(f"--config {path}: base {base!r} is no name of a recipe or of a file beside it")
    beside = path.with_name(f"{base}.yaml")
    file = beside if beside.is_file() else RECIPES / f"{base}.yaml"
    if file in (path, *inherited_by):
        raise ValueError(f"--config {path}: base {base!r} leads back to itself")
    return read_recipe(file, (path, *inherited_by)) | entries


def _saved_flags(run: Path, typed: Collection[str]) -> list[str]:
    """The settings that a run was started with, as command line words; those that are not the defaults are logged.

    Raises ValueError for those that count only when typed again, unless they are among the names `typed`.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"--resume {run}: no run in this folder (it has no config.json)")
    try:
        settings = {name: value for section in read_json(path).values() for name, value in section.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"--resume {run}: {path.name} cannot be read: {error}") from error
    unknown = [f"{name}={value!r}" for name, value in settings.items() if name not in FIELDS]
    if unknown:
        raise ValueError(
            f"--resume {run}: made by another version, whose settings this one does not have: {', '.join(unknown)}; "
            f"finish it with that version, or delete them from {path}"
        )
    changed = {name: value for name, value in settings.items() if value != FIELDS[name].default}
    logger.info("resume: %s has %s", path, ", ".join(f"{name}={value!r}" for name, value in changed.items()))
    packaged = [file.stem for file in RECIPES.glob("*.json")]
    asked = [name for name in changed if name in TYPED_AGAIN and name not in typed and changed[name] not in packaged]
    if asked:
        raise ValueError(
            f"--resume {run}: was started with {' '.join(f'--{name} {changed[name]!r}' for name in asked)}, which "
            f"counts only when typed again: type it if you want it, or delete it from {path}"
        )
    return _flags(settings)


def _flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def parse_args(arguments: Sequence[str]) -> Config:
    """Settings from command line words; `--config FILE.yaml` counts as flags typed first.

    Without `--config` the base is `default_recipe`, or with `--resume RUN` what that run was started with.
    Raises ValueError for unknown flags and for values of the wrong type or out of range.
    """
    from transformers import HfArgumentParser

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", type=Path)
    files.add_argument("--resume", type=Path)
    sections: Any = SECTIONS
    parser = HfArgumentParser(
        sections, prog="train.py", description=DESCRIPTION, allow_abbrev=False, exit_on_error=False
    )
    try:
        given, words = files.parse_known_args(list(arguments))
        typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        config = given.config or (None if given.resume else default_recipe(words))
        recipe = read_recipe(_config_file(config)) if config else {}
        typed |= recipe.keys()
        saved = [*_saved_flags(given.resume, typed), f"--resume={given.resume}"] if given.resume else []
        flags = [*saved, *_flags(recipe), *words]
        *settings, unknown = parser.parse_args_into_dataclasses(args=flags, return_remaining_strings=True)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"unknown flag: {' '.join(unknown)}")
    made = Config(*settings)
    if given.resume and "offline" not in typed:
        is_hub_name = made.model.model != "tiny" and not os.path.exists(os.path.expanduser(made.model.model))
        made.model.offline = is_hub_name and "model" not in typed
    return made


def default_recipe(words: Sequence[str]) -> Path:
    """`tiny_cpu` for the embedded model on the embedded data, `own_videos` as soon as `words` ask for either's own."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, embedded in (("model", "tiny"), ("annotations", "synthetic")):
        asked.add_argument(f"--{name}", default=embedded)
    given, _ = asked.parse_known_args(list(words))
    return Path("tiny_cpu" if (given.model, given.annotations) == ("tiny", "synthetic") else "own_videos")


def describe_settings(arguments: Sequence[str], config: Config) -> str:
    """Which recipe the command line words took and what it comes to in the main, in a few short lines."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked.add_argument("--config")
    given, words = asked.parse_known_args(list(arguments))
    run = config.train.resume
    recipe = given.config or (f"of {run}" if run else f"{default_recipe(words)} (--config takes another)")
    model, data, rollout, train = config.model, config.data, config.rollout, config.train
    pixels = f"{data.min_pixels or 'default'} to {data.max_pixels or 'default'} pixels"
    return "\n".join([
        f"recipe   {recipe}",
        f"         {model.model} on {data.annotations}, videos {data.videos}, into {run or train.output_dir}",
        f"         {train.phases}, learning rate {train.learning_rate:g}, beta {config.algorithm.beta:g}",
        f"         {data.fps:g} frames per second, at most {data.max_frames}, of {pixels}; crops {data.random_crop:g}",
        f"         {rollout.num_generations} answers of at most {rollout.max_completion_length} tokens; ZeRO "
        f"{train.zero_stage}, offload {train.offload}",
    ])  # fmt: skip


def _config_file(given: Path) -> Path:
    """A file, or the name of one of the recipes that come with the package."""
    recipe = RECIPES / f"{given}.yaml"
    return recipe if recipe.is_file() and not given.exists() else given


def settings_table() -> str:
    """Every setting by section, as Markdown: its flag, type or choices, default and meaning."""
    lines = ["# Settings", "", "Each is a flag (`--name value`) and a line of a recipe (`name: value`)."]
    for section in SECTIONS:
        title = section.__name__.removesuffix("Config")
        lines += ["", f"## {title}", "", section.__doc__ or "", "", "| setting | type or choices | default | meaning |"]
        lines += ["|---|---|---|---|"]
        types = get_type_hints(section)
        for field in dataclasses.fields(section):
            cells = f"`{field.name}`", _type_name(types[field.name]), f"`{field.default}`", field.metadata["help"]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _type_name(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return ", ".join(map(str, get_args(type_)))
    given = [each for each in get_args(type_) or (type_,) if each is not type(None)]
    return given[0].__name__


if __name__ == "__main__":
    print(settings_table(), end="")

"""Settings read from command line words, recipe files and the record of an earlier run.

`python -m tempsamp_fast.arguments > docs/settings.md` writes the table of all of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tempsamp_fast.config import AlgorithmConfig, Config, DataConfig, ModelConfig, RolloutConfig, TrainConfig
from tempsamp_fast.config.recipe import RECIPES, RUNS_CODE, read_recipes, runs_code
from tempsamp_fast.config.setting import did_you_mean
from tempsamp_fast.system.files import read_json

logger = logging.getLogger(__name__)

SECTIONS = (DataConfig, ModelConfig, RolloutConfig, AlgorithmConfig, TrainConfig)
TYPED_AGAIN = (
    *RUNS_CODE, "rewards", "record_rollouts", "patch_cache", "synthetic_dir", "deepspeed_config", "video_device",
    "prompt_file",
)  # fmt: skip
"""Those that must be typed again to resume: the record may be a stranger's, and these run, write or open something
(`rewards` where they are a file's)."""
FIELDS: dict[str, Any] = {
    name: field
    for section in SECTIONS
    for field in dataclasses.fields(section)
    for name in (field.name, *(alias.removeprefix("--") for alias in field.metadata["aliases"]))
}
"""By their names, former ones too."""
TYPES: dict[str, Any] = {name: type_ for section in SECTIONS for name, type_ in get_type_hints(section).items()}
USAGE = "deepspeed tempsamp_fast/train.py, or tempsamp train, [--config RECIPE [RECIPE ...]] [--SETTING VALUE ...]"
DESCRIPTION = """--config takes the settings of recipes first, in place of the defaults below: names of those that come
with the package, or YAML files; of several, later ones win, and flags win over all. Without it that is tiny_cpu for the
tiny model on the embedded data, else own_videos. --resume RUN takes those the run was started with. A number's unit
stands in [brackets], where it is from in (parentheses)."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names every flag once, not with hyphens too."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        values = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(names) + values


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
    asked = [
        name
        for name, value in changed.items()
        if name in TYPED_AGAIN and name not in typed and value not in packaged
        if name != "rewards" or runs_code(name, value)
    ]
    if asked:
        raise ValueError(
            f"--resume {run}: was started with {' '.join(f'--{name} {changed[name]!r}' for name in asked)}, which "
            f"counts only when typed again: type it if you want it, or delete it from {path}"
        )
    return _flags(settings)


def _flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def parse_args(arguments: Sequence[str]) -> Config:
    """Settings from command line words; recipes named by `--config` count as flags typed first.

    Without `--config` the base is `default_recipe`, or with `--resume RUN` what that run was started with.
    Raises ValueError for unknown settings and for values of the wrong type or out of range, naming the file and line of
    those that a recipe has.
    """
    parser = _parser()
    try:
        given, words = _files().parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    recipe = read_recipes(given.config or ([] if given.resume else [default_recipe(words)]))
    for name, entry in recipe.items():
        if name not in FIELDS:
            raise ValueError(f"{entry.place}: unknown setting {name!r}{did_you_mean(name, FIELDS)}")
        _parse(parser, _flags({name: entry.value}), f"{entry.place}: ")
    saved = [*_saved_flags(given.resume, typed | recipe.keys()), f"--resume={given.resume}"] if given.resume else []
    flags = [*saved, *_flags({name: entry.value for name, entry in recipe.items()}), *words]
    _parse(parser, flags)
    try:
        *settings, unknown = parser.parse_args_into_dataclasses(
            args=flags, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        blamed = (re.match(r"\w+(?=[=:])", str(error)) or [""])[0]
        if blamed in recipe and blamed not in typed:
            raise ValueError(f"{recipe[blamed].place}: {error}") from error
        raise
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ValueError(f"unknown flag: {' '.join(unknown)}{did_you_mean(flag, [f'--{name}' for name in FIELDS])}")
    made = Config(*settings)
    if given.resume and "output_dir" in typed and Path(made.train.output_dir).resolve() != given.resume.resolve():
        raise ValueError(f"output_dir={made.train.output_dir!r}: --resume goes on in {given.resume}; leave it out")
    if given.resume and "offline" not in typed | recipe.keys():
        is_hub_name = made.model.model != "tiny" and not os.path.exists(os.path.expanduser(made.model.model))
        made.model.offline = is_hub_name and "model" not in typed | recipe.keys()
    return made


def _files() -> argparse.ArgumentParser:
    """What is read before the settings themselves."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", nargs="+", action="extend")
    files.add_argument("--resume", type=Path)
    return files


def _parser() -> Any:
    from transformers import HfArgumentParser

    sections: Any = SECTIONS
    for section in sections:
        section._argument_group_name = f"{section.__name__.removesuffix('Config').lower()}: {section.__doc__}"
    recipes = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    about = f"{DESCRIPTION} Recipes: {recipes}."
    return HfArgumentParser(
        sections, usage=USAGE, description=about, formatter_class=_Help, allow_abbrev=False, exit_on_error=False
    )


def _parse(parser: argparse.ArgumentParser, flags: Sequence[str], place: str = "") -> None:
    """Raise ValueError, with the choice that was probably meant, for a value of the wrong type."""
    try:
        parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").partition("/")[0].removeprefix("--")
        value = re.search(r"invalid choice: '(.*?)'", str(error))
        meant = did_you_mean(value[1], map(str, get_args(TYPES.get(name)))) if value else ""
        raise ValueError(f"{place}{error}{meant}") from error


def default_recipe(words: Sequence[str]) -> str:
    """`tiny_cpu` for the embedded model on the embedded data, `own_videos` as soon as `words` ask for either's own."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, embedded in (("model", "tiny"), ("annotations", "synthetic")):
        asked.add_argument(f"--{name}", default=embedded)
    given, _ = asked.parse_known_args(list(words))
    return "tiny_cpu" if (given.model, given.annotations) == ("tiny", "synthetic") else "own_videos"


def describe_settings(arguments: Sequence[str], config: Config) -> str:
    """Which recipe the command line words took and what it comes to in the main, in a few short lines."""
    given, words = _files().parse_known_args(list(arguments))
    run = config.train.resume
    default = f"of {run}" if run else f"{default_recipe(words)} (--config takes another)"
    recipe = " ".join(given.config or [default])
    model, data, rollout, train = config.model, config.data, config.rollout, config.train
    pixels = f"{data.min_pixels or 'default'} to {data.max_pixels or 'default'} pixels"
    return "\n".join([
        f"recipe   {recipe}",
        f"model    {model.model}{': small, with random weights' if model.model == 'tiny' else ''}",
        f"data     {data.annotations}",
        f"videos   {data.videos or data.synthetic_dir}",
        f"into     {run or train.output_dir}",
        textwrap.fill(f"steps    {train.phases.replace(',', ', ')}", 80, subsequent_indent=" " * 9),
        f"         learning rate {train.learning_rate:g}, beta {config.algorithm.beta:g}",
        f"frames   {data.fps:g} per second, at most {data.max_frames}, of {pixels}; crops {data.random_crop:g}",
        f"answers  {rollout.num_generations} of at most {rollout.max_completion_length} tokens; ZeRO "
        f"{train.zero_stage}, offload {train.offload}",
    ])  # fmt: skip


def settings_table() -> str:
    """Every setting by section, as Markdown: its flag, type or choices, default and meaning."""
    lines = ["# Settings", "", "Each is a flag (`--name value`) and a line of a recipe (`name: value`)."]
    for section in SECTIONS:
        title = section.__name__.removesuffix("Config")
        lines += ["", f"## {title}", "", section.__doc__ or "", "", "| setting | type or choices | default | meaning |"]
        lines += ["|---|---|---|---|"]
        for field in dataclasses.fields(section):
            cells = f"`{field.name}`", _type_name(TYPES[field.name]), f"`{field.default}`", field.metadata["help"]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _type_name(type_: Any) -> str:
    if get_origin(type_) is Literal:
        return ", ".join(map(str, get_args(type_)))
    given = [each for each in get_args(type_) or (type_,) if each is not type(None)]
    return given[0].__name__


if __name__ == "__main__":
    print(settings_table(), end="")

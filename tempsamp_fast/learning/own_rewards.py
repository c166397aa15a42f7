"""The rewards of a run: those of the package, and functions of a file that was named on the command line.

A function of one's own is `f(completions, samples, ...) -> list of numbers`: the texts of a group's answers and,
aligned with them, what is asked (`Sample`). It takes of `samples`, `mode`, `require_tags` and `answer_form` those that
it has parameters for.
Whatever goes wrong in it is a ValueError that names the file and the line.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.config.reward_terms import RewardTerm, parse_rewards
from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.data.prompts import off_policy_text
from tempsamp_fast.rewards import REWARDS, TASK_REWARDS, Reward
from tempsamp_fast.sample import Sample, Task

logger = logging.getLogger(__name__)


def reward_terms(algorithm: AlgorithmConfig, task: Task) -> tuple[RewardTerm, ...]:
    """What answers are rewarded for, but for `format`: the task's own reward, or what `rewards` says."""
    return parse_rewards(algorithm.rewards) or (RewardTerm(TASK_REWARDS[task]),)


def reward_function(term: RewardTerm) -> Reward:
    """The function of a term, its file run when it is first asked for.

    Raises ValueError for a name that there is no reward of, and for a file that does not run.
    """
    if term.file:
        return _own_reward(term)
    if term.name not in REWARDS:
        raise ValueError(f"rewards: no reward {term.name!r}; {choose_from(term.name, sorted(REWARDS))}")
    return REWARDS[term.name]


@cache
def _own_reward(term: RewardTerm) -> Reward:
    if term.name in REWARDS:
        raise ValueError(f"rewards: {term.file}:{term.name} has the name of a reward of the package; call it otherwise")
    functions = {name: value for name, value in vars(_module(term.file)).items() if inspect.isfunction(value)}
    if term.name not in functions:
        theirs = [name for name, value in functions.items() if value.__module__ == _module(term.file).__name__]
        raise ValueError(f"--rewards {term.file}: no function {term.name!r}; {choose_from(term.name, theirs)}")
    function = functions[term.name]
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters)
    names = {each.name for each in parameters}
    code = function.__code__
    line = code.co_firstlineno if code.co_filename == str(Path(term.file).resolve()) else None
    where = f"--rewards {term.file}: {f'line {line}' if line else code.co_filename}: {term.name}"

    def checked(completions: Sequence[str], **given: Any) -> list[float]:
        taken = {name: value for name, value in given.items() if takes_all or name in names}
        try:
            found: Any = function([*completions], **taken)
            values = list(found) if hasattr(found, "__iter__") else None
        except (Exception, SystemExit) as error:  # their code may raise anything
            raise ValueError(_place(term.file, error, line)) from error
        if values is None:
            raise ValueError(f"{where} returned {repr(found)[:60]}; expected a list of {len(completions)} numbers")
        if len(values) != len(completions):
            raise ValueError(f"{where} returned {len(values)} rewards for {len(completions)} answers")
        return [_number(where, index, value) for index, value in enumerate(values)]

    return checked


def _number(where: str, index: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} returned {repr(value)[:60]} for answer {index}; expected a finite number")
    return number


@cache
def _module(file: str) -> ModuleType:
    """The file as a module; what lies beside it may be imported, after everything that is installed."""
    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(f"own_rewards_of_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"--rewards {file}: no such file")
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.parent))
    sys.modules[spec.name] = module  # where dataclasses and pickles look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # their code may raise anything
        del sys.modules[spec.name]
        raise ValueError(_place(file, error)) from error
    return module


def _place(file: str, error: BaseException, line: int | None = None) -> str:
    """`--rewards mine.py: line 3: KeyError: 'x'`: the last line of theirs on the way to the error, else `line`.

    Of a file beside it, the place in that one follows.
    """
    path, steps = Path(file).resolve(), traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in steps if Path(frame.filename).parent == path.parent]
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, text = [error.lineno], error.msg
    place = f"line {lines[-1] if lines else line}: " if lines or line else ""
    if lines and frames and frames[-1].filename != str(path):
        place += f"{Path(frames[-1].filename).name}: line {frames[-1].lineno}: "
    return f"--rewards {file}: {place}{type(error).__name__}: {text[:200]}"


def try_rewards(algorithm: AlgorithmConfig, task: Task, samples: Sequence[Sample]) -> None:
    """Reward what may be answered about the first sample, so that errors come before anything is loaded.

    The true answer and an empty one, of which it tells, and among eight some that are cut, too long or no answer.
    """
    for term in reward_terms(algorithm, task):
        function = reward_function(term)
        if term.file and samples:
            true = off_policy_text(samples[0], "answer", task=task) or ""
            texts = [true, "", true[: len(true) // 2], true + true, "so " * 2000, "<answer>", "9.5 to 2.0", "\n\u00e9"]
            options = {"require_tags": algorithm.require_tags, "mode": "answer"}
            found = function(texts, samples=[samples[0]] * len(texts), **options)
            logger.info("reward %s: %.3g for the first true answer, %.3g for an empty one", term.name, *found[:2])

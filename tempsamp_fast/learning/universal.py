"""Engine states on another number of ranks than saved them, through DeepSpeed's universal checkpoints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.config import ModelConfig, TrainConfig
from tempsamp_fast.learning.engine import STATE, build_engine, load_engine, load_without_code
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.system.files import fresh_folder
from tempsamp_fast.system.ranks import barrier, is_first_rank, made_by_first_rank, num_ranks

WRITTEN = r"(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt"
NOT_OURS = ("universal_checkpoint_info", "ds_autoep_layers", "autoep_layers")
"""Parts of a state that steer the converter, and that engines made here do not write."""


def restored_engine(policy: Policy, train: TrainConfig, model: ModelConfig, dtype: torch.dtype, saved: Path) -> Any:
    """`build_engine` with the state in the engine folder `saved`, whatever number of ranks wrote it.

    What is converted lies beside the run's checkpoints meanwhile. Raises as `loadable_state` and `load_engine` do.
    """
    scratch = saved.parents[2] / "universal"
    with loadable_state(saved, scratch, model.allow_pickle) as (folder, is_universal):
        engine = build_engine(policy, train, dtype, load_universal=is_universal)
        load_engine(engine, folder, model.allow_pickle, has_all_weights=not model.lora_rank)
    return engine


@contextmanager
def loadable_state(saved: Path, scratch: Path, allow_pickle: bool) -> Iterator[tuple[Path, bool]]:
    """The engine state in `saved` as this number of ranks can load it, and whether it is a universal checkpoint now.

    What ZeRO partitioned over another number of ranks is converted into the folder `scratch`, which is deleted on
    leaving. Both folders are seen by all ranks; called by every rank.
    Raises ValueError for a file that DeepSpeed would not have written and, unless `allow_pickle`, for one that holds
    more than tensors; OSError when conversion fails.
    """
    if num_partitions(saved) in (0, num_ranks()):
        yield saved, False
        return
    failure = made_by_first_rank(lambda: _convert(saved / STATE, scratch / STATE, allow_pickle))
    if failure is not None:
        raise failure
    try:
        yield scratch, True
        barrier()
    finally:
        if is_first_rank():
            shutil.rmtree(scratch)


def num_partitions(saved: Path) -> int:
    """The ranks over which ZeRO had partitioned the optimizer state in an engine folder; 0 without ZeRO."""
    return len(list((saved / STATE).glob("*_optim_states.pt")))


def _convert(state: Path, universal: Path, allow_pickle: bool) -> Exception | None:
    """Run DeepSpeed's converter in a process of its own; returns what went wrong, if anything."""
    try:
        for file in sorted(state.rglob("*")):
            _check(file, state, allow_pickle)
        scratch = fresh_folder(universal.parent).resolve()
    except (ValueError, OSError) as error:
        return error
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    done = subprocess.run(
        [*command, "--input_folder", str(state.resolve()), "--output_folder", str(scratch / universal.name)],
        cwd=scratch,  # empty: Python looks for modules where it is started
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    last_words = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    return OSError(f"{state}: cannot be converted for {num_ranks()} ranks: {last_words}")


def _check(file: Path, state: Path, allow_pickle: bool) -> None:
    """Raise ValueError for what the converter should not open: it runs whatever code a file holds, makes paths of the
    names of parameters, and looks into folders within `state`.
    """
    if file.is_symlink() or not file.is_file() or not re.fullmatch(WRITTEN, str(file.relative_to(state))):
        raise ValueError(f"{file}: is not what DeepSpeed writes there, and is not converted; remove it")
    if not allow_pickle:
        found = load_without_code(str(file), map_location="meta")
        for name in _keys(found):
            if "/" in name or name in ("..", *NOT_OURS):
                raise ValueError(f"{file}: has {name[:80]!r}, which no state of this trainer has, and is not converted")


def _keys(found: Any) -> Iterator[str]:
    """Every name in a file, of parameters and others."""
    waiting = [found]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            yield from (key for key in each if isinstance(key, str))
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each

"""Engine states on another number of ranks than saved them, through DeepSpeed's universal checkpoints."""

from __future__ import annotations

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
from tempsamp_fast.system.ranks import barrier, is_first_rank, made_by_first_rank, num_ranks


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
    Raises ValueError for a file that holds more than tensors, unless `allow_pickle`; OSError when conversion fails.
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
    if not allow_pickle:  # the converter runs whatever code a file holds
        for file in sorted(state.glob("*.pt")):
            try:
                load_without_code(str(file), map_location="meta")
            except ValueError as error:
                return error
    shutil.rmtree(universal.parent, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    done = subprocess.run(
        [*command, "--input_folder", str(state), "--output_folder", str(universal)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    last_words = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
    return OSError(f"{state}: cannot be converted for {num_ranks()} ranks: {last_words}")

"""Saving and finding checkpoints: a Hugging Face folder plus the engine's state, complete or not there at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from tempsamp_fast.chat import Chat
from tempsamp_fast.config import Config, DataConfig
from tempsamp_fast.policy import Policy
from tempsamp_fast.runlog import write_json

MODEL = "model"
ENGINE = "engine"
STATE = "state.json"
VIDEO_SETTINGS = "video.json"
VIDEO_FIELDS = ("sampling", "fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "task")


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step_000300, holding `model/` (loads with plain `from_pretrained`) and `engine/`."""
    return run / "checkpoints" / f"step_{step:06d}"


def save_model(folder: Path, policy: Policy, chat: Chat, data: DataConfig) -> None:
    """Write model, tokenizer and preprocessor settings as an ordinary Hugging Face folder.

    `video.json` beside them says how frames were taken in training, so that inference takes them alike.
    Raises OSError when it cannot be written.
    """
    try:
        policy.base_model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: weights not written: {error}") from error
    chat.tokenizer.save_pretrained(folder)
    for name, text in chat.preprocessor_files.items():
        (folder / name).write_text(text)
    write_json(folder / VIDEO_SETTINGS, {name: getattr(data, name) for name in VIDEO_FIELDS})


def read_video_settings(folder: Path) -> DataConfig:
    """How frames were taken when the model in `folder` was trained; the defaults for a folder not written here."""
    path = folder / VIDEO_SETTINGS
    return DataConfig(**json.loads(path.read_text())) if path.is_file() else DataConfig()


def save_checkpoint(run: Path, step: int, engine: Any, policy: Policy, chat: Chat, config: Config) -> Path:
    """Write a checkpoint aside and rename it when complete, then delete all but the newest `keep_checkpoints`.

    `step` optimizer steps are done. Called by every rank. A write that fails (a full disk, say) raises OSError and
    leaves the checkpoints that were there; the unfinished one is removed.
    """
    final = checkpoint_folder(run, step)
    partial = final.with_name(final.name + ".partial")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    try:
        engine.save_checkpoint(str(partial / ENGINE), tag="state")
        if is_first:
            save_model(partial / MODEL, policy, chat, config.data)
            write_json(partial / STATE, {"step": step})
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final}: checkpoint not written: {str(error).splitlines()[0]}") from error
    _barrier()
    if is_first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(run)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    _barrier()
    return final


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(folder for folder in folders if folder.suffix == "" and (folder / STATE).is_file())


def latest_checkpoint(run: Path) -> tuple[Path, int]:
    """The newest complete checkpoint and its number of steps. Raises ValueError when the run has none."""
    found = checkpoints(run)
    if not found:
        raise ValueError(f"resume={str(run)!r}: no complete checkpoint in {run / 'checkpoints'}")
    return found[-1], json.loads((found[-1] / STATE).read_text())["step"]


def _barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()

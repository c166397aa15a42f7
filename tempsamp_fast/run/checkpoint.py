"""Saving and finding checkpoints: a Hugging Face folder plus the engine's state, complete or not there at all."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from statistics import fmean
from typing import Any

from safetensors import SafetensorError

from tempsamp_fast.config import Config, DataConfig, TrainConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.prompt_file import SAVED, as_json
from tempsamp_fast.learning.decays import with_decays
from tempsamp_fast.learning.engine import save_engine
from tempsamp_fast.learning.partitioned import is_partitioned, whole_parameters
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.run.log import RECORDS, write_json
from tempsamp_fast.system.durable import (
    PARTIAL,
    Digests,
    Sealing,
    damage,
    partial_folder,
    publish,
    remove,
    require_space,
    size_of,
    sync,
)
from tempsamp_fast.system.files import fresh_folder, own_folder, read_json, remove_any, write_file
from tempsamp_fast.system.ranks import barrier, is_first_rank

logger = logging.getLogger(__name__)

MODEL = "model"
ENGINE = "engine"
BEST = "best"
EVALUATIONS = "results.json"
STATE = "state.json"
VIDEO_SETTINGS = "video.json"
VIDEO_FIELDS = ("sampling", "fps", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "task",
                "answer_form")  # fmt: skip


def checkpoint_folder(run: Path, step: int) -> Path:
    """RUN/checkpoints/step_000300, holding `model/` (loads with plain `from_pretrained`) and `engine/`."""
    return run / "checkpoints" / f"step_{step:06d}"


def save_model(folder: Path, policy: Policy, chat: Chat, data: DataConfig) -> None:
    """Write model, tokenizer and preprocessor settings as an ordinary Hugging Face folder; called by every rank.

    Of a model with adapters only those are written, as PEFT does. `video.json` beside them says how frames were taken
    in training, so that inference takes them alike, and `prompts.json` what was asked, where that was one's own.
    Raises OSError when it cannot be written.
    """
    state = whole_parameters(policy.model) if is_partitioned(policy) else None
    if not is_first_rank():
        return
    try:
        policy.model.save_pretrained(folder, state_dict=with_decays(policy.model, state))  # type: ignore[operator]
    except SafetensorError as error:
        raise OSError(f"{folder}: weights not written: {error}") from error
    chat.tokenizer.save_pretrained(folder)
    for name, text in chat.preprocessor_files.items():
        write_file(folder / name, text)
    write_json(folder / VIDEO_SETTINGS, {name: getattr(data, name) for name in VIDEO_FIELDS})
    if chat.templates is not None:
        write_file(folder / SAVED, as_json(chat.templates))


def read_video_settings(folder: Path) -> DataConfig:
    """How frames were taken when the model in `folder` was trained; the defaults for a folder not written here."""
    path = folder / VIDEO_SETTINGS
    if not path.is_file():
        return DataConfig()
    found = read_json(path)
    try:
        return DataConfig(**{name: value for name, value in found.items() if name in VIDEO_FIELDS})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def save_checkpoint(
    run: Path, step: int, engine: Any, policy: Policy, chat: Chat, config: Config, facts: dict[str, Any]
) -> Sealing:
    """Write a checkpoint aside; what is returned syncs and renames it, then deletes all but those that are to be kept.

    `step` optimizer steps are done. `facts` of the run (see `resume.facts_of`) and the hash of every file are kept in
    `state.json`. Called by every rank. Where the disk is almost full nothing is written; a write that fails raises
    OSError and leaves the checkpoints that were there; the unfinished one is removed.
    """
    final = checkpoint_folder(run, step)
    partial = partial_folder(final)
    if is_first_rank():
        own_folder(final.parent)
        for unfinished in final.parent.glob(f"*{PARTIAL}"):
            remove_any(unfinished)
        partial.mkdir()
    barrier()
    try:
        has_all_weights = not config.model.lora_rank
        require_space(partial, _expected_size(run, policy, has_all_weights), f"checkpoint {final.name}")
        save_engine(engine, partial / ENGINE, has_all_weights)
        save_model(partial / MODEL, policy, chat, config.data)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{final}: checkpoint not written: {str(error).splitlines()[0]}") from error
    facts = {"step": step, "zero_stage": int(engine.zero_optimization_stage()), **facts}

    def complete(files: Digests) -> None:
        _publish(final, facts | {"files": files}, [run / name for name in RECORDS])
        try:
            best = best_checkpoint(run) if config.train.keep_best else None
            for old in checkpoints(run)[: -config.train.keep_checkpoints]:
                if old != best:
                    remove(old)
        except (OSError, ValueError) as error:
            logger.warning("older checkpoints than %s stay: %s", final, error)

    return Sealing(final, complete)


def _publish(final: Path, state: dict[str, Any], records: Sequence[Path] = ()) -> None:
    """Give the folder written aside its STATE and its name; `records` are synced before. Called by one rank."""
    path = partial_folder(final) / STATE
    write_json(path, state)
    for record in (path, *records):
        if record.exists():
            sync(record)
    publish(final)


def _expected_size(run: Path, policy: Policy, has_all_weights: bool) -> int:
    """Bytes: as the newest checkpoint, or as many as weights and Adam's float32 state take. Adds a tenth.

    has_all_weights: as of `save_engine`; of a model with adapters these alone are written.
    """
    kept = checkpoints(run)
    if kept:
        return int(1.1 * size_of(kept[-1]))
    bytes_of = lambda each, per_value: per_value * getattr(each, "ds_numel", each.numel())
    trained = [each for each in policy.parameters() if each.requires_grad]
    written = list(policy.parameters()) if has_all_weights else trained
    state = sum(bytes_of(each, 12) for each in trained)
    return int(1.1 * (state + 2 * sum(bytes_of(each, each.element_size()) for each in written)))


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    complete = [each for each in folders if re.fullmatch(r"step_\d{6,12}", each.name) and (each / STATE).is_file()]
    return sorted(complete, key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps after which a checkpoint was made, by its name."""
    return int(folder.name.removeprefix("step_"))


def model_folder(given: str) -> str:
    """The model that a name stands for: of a run folder its newest checkpoint's, of a checkpoint its own, else itself.

    `RUN/best` is that of the run's best evaluation. Raises ValueError for a run without such a checkpoint.
    """
    folder = Path(given)
    if _is_run(folder):
        return str(latest_checkpoint(folder)[0] / MODEL)
    if folder.name == BEST and _is_run(folder.parent):
        best = best_checkpoint(folder.parent)
        if best is None:
            raise ValueError(f"{folder}: no checkpoint of this run was evaluated; {folder.parent} is its newest")
        return str(best / MODEL)
    return str(folder / MODEL) if (folder / STATE).is_file() and (folder / MODEL).is_dir() else given


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or (folder / "machine.json").is_file()


def best_checkpoint(run: Path) -> Path | None:
    """Of the checkpoints that were evaluated, that with the best value of the run's `best_metric`.

    Of several the newest; None without any. Raises ValueError naming evaluations that cannot be read.
    """
    path, config = run / EVALUATIONS, run / "config.json"
    rows = read_json(path) if path.is_file() else []
    try:
        train = read_json(config)["train"] if config.is_file() else {}
        scores = evaluation_scores(rows, train.get("best_metric"), train.get("eval_modes", TrainConfig.eval_modes))
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read: {error!r}") from error
    evaluated = [each for each in checkpoints(run) if step_of(each) in scores]
    return max(evaluated, key=lambda each: (scores[step_of(each)], step_of(each)), default=None)


def evaluation_scores(rows: Sequence[dict[str, Any]], best_metric: str | None, eval_modes: str) -> dict[int, float]:
    """By number of steps the value of `[mode/]metric`, where it names no mode in the mean of `eval_modes`.

    None is the first score (mIoU). Evaluations that were stopped before their last mode are left out.
    """
    mode, _, name = (best_metric or "").rpartition("/")
    needed = [mode] if mode else eval_modes.split("+")
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["mode"] in needed:
            found.setdefault(row["num_steps"], {})[row["mode"]] = float(row[name or score_names(row)[0]])
    return {
        num_steps: fmean(values[mode] for mode in needed)
        for num_steps, values in found.items()
        if len(values) == len({*needed})
    }


def score_names(row: dict[str, Any]) -> list[str]:
    """The metrics of an evaluation's row, the first one first."""
    return [name for name in row if name not in ("stage", "mode", "num_steps", "num_skipped", "protocol")]


def latest_checkpoint(run: Path) -> tuple[Path, int]:
    """The newest complete checkpoint and its number of steps. Raises ValueError when the run has none."""
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{run}: no complete checkpoint in {run / 'checkpoints'}")
    return found[-1], step_of(found[-1])


def sound_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files are as they were written, and its `state.json`; None where none was made.

    Broken ones that are newer are renamed `<name>.broken` with a warning. Called by every rank. Raises ValueError
    naming what is wrong with each when all are broken.
    """
    broken: dict[Path, str] = {}
    for folder in reversed(checkpoints(run)):
        wrong, state = _check(folder)
        if not wrong:
            _put_aside(list(broken))
            return folder, state
        broken[folder] = f"{folder}: {', '.join(wrong[:3])}"
        logger.warning("checkpoint is broken, looking for the one before: %s", broken[folder])
    if broken:
        raise ValueError(f"resume={str(run)!r}: every checkpoint is broken: {'; '.join(broken.values())}")
    return None


def _put_aside(broken: Sequence[Path]) -> None:
    barrier()
    if is_first_rank():
        for folder in broken:
            remove_any(folder.with_suffix(".broken"))
            folder.rename(folder.with_suffix(".broken"))
    barrier()


def _check(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a checkpoint, and its state."""
    try:
        state = read_json(folder / STATE)
        step = int(state["step"])
        files = _digests(state["files"]) if "files" in state else None
    except (ValueError, KeyError, TypeError) as error:
        return [f"{STATE} cannot be read: {error}"], {}
    if step != step_of(folder):
        return [f"{STATE} is of step {step}"], {}
    if files is None:
        logger.warning("%s: made by an earlier version, without hashes: taken unchecked", folder)
        return [], state
    return damage(folder, files), state


def _digests(files: Any) -> Digests:
    """What a `state.json` holds under `files`; ValueError where that is not the digests of at least one file."""
    if not isinstance(files, dict) or not files:
        raise ValueError(f"files is {repr(files)[:60]}; expected bytes and SHA-256 by name")
    for name, digest in files.items():
        if not isinstance(digest, list) or [type(part) for part in digest] != [int, str]:
            raise ValueError(f"files has {repr(digest)[:60]} for {name[:60]!r}; expected bytes and SHA-256")
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise ValueError(f"files names {name[:60]!r}, which is not in the folder")
    return {name: (size, found) for name, (size, found) in files.items()}


def save_reference(folder: Path, policy: Policy, chat: Chat, data: DataConfig) -> None:
    """Write the reference model as a checkpoint is written: aside, hashed, renamed. Called by every rank."""
    partial = partial_folder(folder)
    if is_first_rank():
        fresh_folder(partial)
    save_model(partial, policy, chat, data)
    Sealing(folder, lambda files: _publish(folder, {"files": files})).wait()


def check_reference(folder: Path) -> None:
    """Raise ValueError unless the reference model is there as it was written. Called by every rank."""
    if not folder.exists():
        raise ValueError(f"{folder}: the reference model is missing, and it cannot be made again after its first step")
    if (folder / STATE).exists():
        try:
            files = _digests(read_json(folder / STATE)["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: the reference model is broken: {STATE} cannot be read: {error}") from error
        wrong = damage(folder, files)
        if wrong:
            raise ValueError(f"{folder}: the reference model is broken: {', '.join(wrong[:3])}")

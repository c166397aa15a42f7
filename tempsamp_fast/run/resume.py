"""Where a run lies, what it goes on from, and what must be as it was for the continuation to be the same run."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempsamp_fast.config import Config, RolloutConfig, TrainConfig, parse_phases
from tempsamp_fast.learning.deepspeed_settings import effective_zero
from tempsamp_fast.run.checkpoint import MODEL, checkpoints, sound_checkpoint
from tempsamp_fast.run.log import own_files
from tempsamp_fast.run.schedule import in_steps
from tempsamp_fast.sample import Sample
from tempsamp_fast.system.files import own_folder, read_json
from tempsamp_fast.system.ranks import barrier

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    "data": {
        "annotations", "eval_annotations", "format", "videos", "eval_videos", "synthetic_dir", "max_eval_samples",
        "prompt_file", "on_bad_sample", "max_bad_videos", "video_backend", "video_device", "prefetch_steps",
        "patch_cache", "video_cache_gib",
    },
    "model": {
        "model", "gradient_checkpointing", "checkpoint_every", "checkpoint_vision", "liger_layers",
        "offline", "trust_remote_code", "allow_pickle",
    },
}  # fmt: skip
"""Settings of data and model that a run survives a change of: paths (samples are compared themselves) and ways to get
the same thing. All others of these two sections are fixed."""
FIXED = {"train": ("seed", "prompts_per_device", "sft_prompts_per_device", "queries_per_video")}
"""Settings of the other sections that are fixed, for they say which prompts come next.
`gradient_accumulation_steps` may change with the number of ranks, so that a step's prompts stay as many."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the checkpoint that it is resumed from."""

    path: Path
    resumed_from: Path | None = None
    state: dict[str, Any] | None = None
    """The `state.json` of that checkpoint."""

    @property
    def first_step(self) -> int:
        return self.state["step"] if self.state else 0

    @property
    def model(self) -> str | None:
        """The model folder of that checkpoint."""
        return str(self.resumed_from / MODEL) if self.resumed_from else None


def open_folder(train: TrainConfig, rollout: RolloutConfig) -> RunFolder:
    """Make the folder of a new run, or find what to resume; called by every rank.

    Raises ValueError for a folder or a record of rollouts that belongs to another run, or to another user.
    """
    folder, record = Path(train.resume or train.output_dir), rollout.record_rollouts
    if train.resume:
        own_folder(folder, may_be_link=True)
    found = sound_checkpoint(folder) if train.resume else None
    if not train.resume and ((folder / "metrics.jsonl").exists() or checkpoints(folder)):
        if not checkpoints(folder):
            raise ValueError(
                f"output_dir={str(folder)!r} holds a run without a checkpoint: delete it or choose another"
            )
        raise ValueError(f"output_dir={str(folder)!r} holds a run; continue it with --resume or choose another")
    if record and not train.resume and Path(record).exists():
        raise ValueError(f"record_rollouts={record!r} exists; only a resumed run adds to a record: choose another")
    barrier()
    own_folder(folder, may_be_link=True)
    if train.resume and not found:
        logger.warning("%s: stopped before its first checkpoint; starting from its beginning", folder)
    return RunFolder(folder, *found) if found else RunFolder(folder)


def facts_of(config: Config, samples: Sequence[Sample], world_size: int) -> dict[str, Any]:
    """What a checkpoint keeps of its run for `check_same_run`, ready for JSON."""
    return {
        "world_size": world_size,
        "samples": samples_digest(samples),
        "config": config.as_dict(),
        "own_files": own_files(config),
    }


def samples_digest(samples: Sequence[Sample]) -> str:
    """The number of training samples and a hash of what is asked and true of each, in order; not of where files lie."""
    asked = [
        [each.sample_id, each.query, each.duration_s, each.windows]
        + ([sorted(each.clip_scores.items())] if each.clip_scores else [])
        + ([each.reasoning] if each.reasoning else [])
        for each in samples
    ]
    text = json.dumps(asked)
    return f"{len(samples)} samples, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_same_run(
    run: Path, state: dict[str, Any], config: Config, samples: Sequence[Sample], world_size: int
) -> None:
    """Refuse to continue a checkpoint of `run` as what it is not; other changes of settings are logged.

    state: the checkpoint's `state.json`; one of an earlier version lacks facts, which are then not compared.
    Raises ValueError that lists every setting in the way, with the run's value and the one asked for.
    """
    then = state.get("config") or read_json(run / "config.json")
    try:
        refused = [
            *_changed_work(state, then["train"], config, samples, world_size),
            *_changed_stage(state, config),
            *_changed_settings(then, config),
            *_changed_files(state, config),
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume={str(run)!r}: its checkpoint does not say how it was made: {error!r}") from error
    if refused:
        raise ValueError(f"resume={str(run)!r} cannot go on with other settings: {'; '.join(refused)}")


def _changed_work(
    state: dict[str, Any], then: dict[str, Any], config: Config, samples: Sequence[Sample], world_size: int
) -> list[str]:
    """What of a step's rows, of the samples and of the steps done is not as it was.

    then: the train section of the run's settings.
    """
    changed = []
    was = then["gradient_accumulation_steps"], state.get("world_size", world_size)
    is_ = config.train.gradient_accumulation_steps, world_size
    if math.prod(was) != math.prod(is_):
        changed.append(
            f"gradient_accumulation_steps was {was[0]} on {was[1]} ranks, is {is_[0]} on {is_[1]}: a step takes "
            f"{math.prod(was)} rows"
        )
    digest = samples_digest(samples)
    if state.get("samples", digest) != digest:
        changed.append(f"samples was {state['samples']}, is {digest}")
    phases, step = then["phases"], state["step"]
    if _done(phases, step, config, samples, world_size) != _done(
        config.train.phases, step, config, samples, world_size
    ):
        changed.append(f"phases was {phases!r}, is {config.train.phases!r}: the {step} steps done are not in it")
    return changed


def _changed_stage(state: dict[str, Any], config: Config) -> list[str]:
    """The stage decides how the engine's state lies on the disk."""
    stage, given = effective_zero(config.train)[0], config.train.deepspeed_config
    if state.get("zero_stage", stage) == stage:
        return []
    return [f"zero_stage was {state['zero_stage']}, is {stage}" + (f" by deepspeed_config={given!r}" if given else "")]


def _changed_settings(then: dict[str, Any], config: Config) -> list[str]:
    """Fixed settings that are not as they were; changes of the others are logged."""
    fixed = []
    for section, settings in config.as_dict().items():
        for name, value in settings.items():
            if name not in then.get(section, {}):
                logger.info("resume: %s=%r is new since the run was started", name, value)
            elif then[section][name] != value:
                change = f"{name} was {then[section][name]!r}, is {value!r}"
                if _is_fixed(section, name):
                    fixed.append(change)
                elif name not in ("resume", "output_dir", "local_rank"):
                    logger.info("resume: %s", change)
    return fixed


def _changed_files(state: dict[str, Any], config: Config) -> list[str]:
    """A prompt file that is not as it was; of files of rewards that is logged, as other changes of rewards are."""
    is_ = own_files(config)
    was = state.get("own_files", is_)
    for setting in is_:
        if sorted(was[setting].values()) != sorted(is_[setting].values()):
            logger.warning(
                "resume: the files of %s are not as they were: %s, now %s", setting, was[setting], is_[setting]
            )
    same = sorted(was["prompt_file"].values()) == sorted(is_["prompt_file"].values())
    return [] if same else ["prompt_file does not ask as it did"]


def _is_fixed(section: str, name: str) -> bool:
    return name not in MAY_CHANGE[section] if section in MAY_CHANGE else name in FIXED.get(section, ())


def _done(phases: str, num_steps: int, config: Config, samples: Sequence[Sample], world_size: int) -> list[Any]:
    """Method, modes and number of the steps taken in every phase begun; rates are free to change."""
    done = []
    for phase in in_steps(parse_phases(phases), config.train, len(samples), world_size):
        taken = min(phase.num_steps, num_steps)
        done += [(phase.method, phase.modes, taken)] if taken else []
        num_steps -= taken
    return done

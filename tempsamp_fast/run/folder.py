"""Where a run lies, and what it goes on from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempsamp_fast.config import RolloutConfig, TrainConfig
from tempsamp_fast.run.checkpoint import MODEL, checkpoints, sound_checkpoint
from tempsamp_fast.system.files import own_folder
from tempsamp_fast.system.ranks import barrier

logger = logging.getLogger(__name__)


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
        raise ValueError(f"output_dir={str(folder)!r} holds a run; continue it with --resume or choose another")
    if record and not train.resume and Path(record).exists():
        raise ValueError(f"record_rollouts={record!r} exists; only a resumed run adds to a record: choose another")
    barrier()
    own_folder(folder, may_be_link=True)
    if train.resume and not found:
        logger.warning("%s: stopped before its first checkpoint; starting from its beginning", folder)
    return RunFolder(folder, *found) if found else RunFolder(folder)

"""Checkpoints on their way to the disk while training goes on: one at a time, made up for where one is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from tempsamp_fast.system.durable import Sealing
from tempsamp_fast.system.ranks import max_over_ranks

logger = logging.getLogger(__name__)


class Saving:
    """A context manager around the loop: the last checkpoint is complete when it is left, also by an error."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sealing: Sealing | None = None
        self._num_lost = 0

    def begin(self, write: Callable[[], Sealing]) -> None:
        """Write a checkpoint's files once the one before is complete; `finish` completes it. Called by every rank.

        Raises OSError where they are not written, or where the two before did not come to their end.
        """
        self._finish_or_tell()
        self._sealing = write()

    def finish(self) -> None:
        """Have the last checkpoint complete; called by every rank. Raises OSError where that fails on any."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.wait()
            self._num_lost = 0

    def has_lost_one(self) -> bool:
        """Whether the last checkpoint has failed, which is told; every rank asks after every step.

        Raises OSError for two in a row.
        """
        if self._sealing is None or not max_over_ranks(int(self._sealing.has_failed), self._device):
            return False
        return not self._finish_or_tell()

    def finish_alone(self) -> None:
        """Where the run is ending: as `Sealing.finish_alone`."""
        if self._sealing is not None:
            self._sealing.finish_alone()

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.finish()
        else:
            self.finish_alone()

    def _finish_or_tell(self) -> bool:
        try:
            self.finish()
        except OSError as error:
            self._num_lost += 1
            if self._num_lost > 1:
                raise
            logger.warning("%s; another one is made", error)
            return False
        return True

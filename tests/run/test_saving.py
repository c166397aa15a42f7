"""Checkpoints that are written in the background and may be lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempsamp_fast.run.saving import Saving


def test_checkpoints_lost_now_and_then_do_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """A whole one between them, as when the disk has room again."""

    def fails() -> None:
        raise OSError("step_000002: not written")

    lost: Any = SimpleNamespace(wait=fails)
    whole: Any = SimpleNamespace(wait=lambda: None)
    saving = Saving(torch.device("cpu"))
    for sealing in (lost, whole, lost, whole):
        saving.begin(lambda sealing=sealing: sealing)
    saving.finish()
    assert caplog.text.count("another one is made") == 2

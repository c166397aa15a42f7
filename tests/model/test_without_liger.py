"""Where liger-kernel is not installed: `auto` says so and leaves the model alone, `on` is refused."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
import torch
from tempsamp_kernels.advantages import SHAPINGS, grouped_advantages

from tempsamp_fast.model import liger_layers
from tempsamp_fast.model.liger_layers import apply_liger_layers


@pytest.fixture
def without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU."""
    monkeypatch.setattr(liger_layers, "HAS_LIGER", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_auto_warns_and_changes_nothing(tiny, without_liger: None, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.model()
    with caplog.at_level(logging.WARNING):
        apply_liger_layers(model, "auto")
    assert "liger-kernel is not installed" in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())


def test_on_is_refused(tiny, without_liger: None) -> None:
    with pytest.raises(ValueError, match=r"liger_layers='on' needs liger-kernel.*auto or off"):
        apply_liger_layers(tiny.model(), "on")


@pytest.mark.parametrize("missing", ["liger_kernel", "triton"])
def test_what_has_kernels_imports_without_it(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Liger itself imports Triton, which has releases for Linux alone: without the one the other is not there."""
    names = ["tempsamp_fast.model.liger_layers", "tempsamp_fast.model.loading", "tempsamp_fast.rollout.delta_step",
             "tempsamp_fast.rollout.decode_attention", "tempsamp_fast.rollout.sampler", "tempsamp_fast.video.nv12",
             "tempsamp_fast.model.tower_rotation", "tempsamp_kernels.optional_triton",
             "tempsamp_kernels.advantages"]  # fmt: skip
    for name in names:
        package, _, module = name.rpartition(".")
        # What is imported below must not stay an attribute of its package, where later tests would patch it.
        monkeypatch.setattr(importlib.import_module(package), module, importlib.import_module(name))
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for name in names:
        assert importlib.import_module(name).__name__ == name
    assert not sys.modules["tempsamp_fast.model.liger_layers"].HAS_LIGER
    rewards, ids, off_policy = torch.tensor([0.2, 0.6, 1.0]), torch.zeros(3, dtype=torch.int64), torch.arange(3) == 2
    for shaping in SHAPINGS:
        given = {"shaping": shaping, "impl": "torch"}
        found = sys.modules["tempsamp_kernels.advantages"].grouped_advantages(rewards, ids, off_policy, **given)
        assert torch.equal(found, grouped_advantages(rewards, ids, off_policy, **given)) and found.any()

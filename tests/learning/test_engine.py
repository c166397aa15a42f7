"""Settings of the optimizer on their way into DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config
from tempsamp_fast.learning.engine import RowsTooLargeError, build_engine, check_fitted


def test_settings_of_the_optimizer_reach_deepspeed() -> None:
    words = ["--max_grad_norm", "0.3", "--weight_decay", "0.2", "--adam_beta2", "0.9", "--zero_stage", "2"]
    settings = deepspeed_config(parse_args(words).train, torch.bfloat16)
    assert settings["gradient_clipping"] == 0.3 and settings["zero_optimization"]["stage"] == 2
    assert settings["optimizer"]["params"]["weight_decay"] == 0.2
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.9]
    assert settings["bf16"] == {"enabled": True}
    assert deepspeed_config(parse_args(words).train, torch.float32)["bf16"] == {"enabled": False}


def test_on_a_gpu_torch_own_fused_optimizer_runs_and_no_other_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for DeepSpeed's on the CPU where the optimizer is offloaded."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    optimizer = lambda *words: deepspeed_config(parse_args(list(words)).train, torch.bfloat16)["optimizer"]["params"]
    plain, offloaded = optimizer("--zero_stage", "2"), optimizer("--zero_stage", "2", "--offload", "optimizer")
    assert (plain["torch_adam"], plain["fused"]) == (True, True)
    assert (offloaded["torch_adam"], "fused" in offloaded) == (False, False)


def test_bfloat16_on_a_gpu_needs_stage_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0 has another optimizer there than on a CPU."""
    train = parse_args(["--zero_stage", "0"]).train
    assert deepspeed_config(train, torch.bfloat16)["zero_optimization"]["stage"] == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert deepspeed_config(train, torch.float32)["zero_optimization"]["stage"] == 0
    with pytest.raises(ValueError, match="zero_stage=0: bfloat16 on a GPU"):
        deepspeed_config(train, torch.bfloat16)


def test_an_engine_that_rounds_the_frequencies_of_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    policy = torch.nn.Module()
    policy.register_buffer("inv_freq", torch.ones(2))
    policy.weight = torch.nn.Parameter(torch.ones(2))

    def initialize(model: torch.nn.Module, **_: object) -> tuple[torch.nn.Module, None, None, None]:
        return model.bfloat16(), None, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    with pytest.raises(ValueError, match="rounds inv_freq"):
        build_engine(policy, parse_args(["--zero_stage", "1"]).train, torch.bfloat16)


def test_rows_that_did_not_fit_on_another_rank_are_too_large_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks pack again, by the longest row of any."""
    of_the_other = iter([1, 900])  # it had no memory, for a row of 900 tokens
    monkeypatch.setattr(
        "tempsamp_fast.learning.engine.max_over_ranks", lambda own, device: max(own, next(of_the_other))
    )
    rows: list[Any] = [SimpleNamespace(num_tokens=40)]
    with pytest.raises(RowsTooLargeError) as error:
        check_fitted(rows, True, torch.device("cpu"))
    assert error.value.num_tokens == 900

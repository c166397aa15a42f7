"""Settings of the optimizer on their way into DeepSpeed."""

from __future__ import annotations

import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.learning.engine import deepspeed_config


def test_settings_of_the_optimizer_reach_deepspeed() -> None:
    words = ["--max_grad_norm", "0.3", "--weight_decay", "0.2", "--adam_beta2", "0.9", "--zero_stage", "2"]
    settings = deepspeed_config(parse_args(words).train, torch.bfloat16)
    assert settings["gradient_clipping"] == 0.3 and settings["zero_optimization"]["stage"] == 2
    assert settings["optimizer"]["params"]["weight_decay"] == 0.2
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.9]
    assert settings["bf16"] == {"enabled": True}
    assert deepspeed_config(parse_args(words).train, torch.float32)["bf16"] == {"enabled": False}

"""Decays of linear layers under a bfloat16 engine: those of the optimizer, in float32, from loading to saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file

from tempsamp_fast.model.linear_layers import DECAYS, UNROUNDED, linear_layers, unrounded
from tempsamp_fast.run.checkpoint import latest_checkpoint, save_model

WORDS = ("--model", "tiny", "--tiny_family", "qwen3_5", "--dtype", "bfloat16", "--zero_stage", "1")
WORDS += ("--learning_rate", "1e-3")


def decays(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What its linear layers compute with."""
    return {
        f"{index} {name}": unrounded(layer, name).detach().clone()
        for index, layer in enumerate(linear_layers(model))
        for name in DECAYS
    }


def test_they_are_loaded_followed_and_saved_unrounded(stepper, tmp_path: Path) -> None:
    one = stepper(*WORDS, "--phases", "sft:2")
    files = load_file(one.run.folder / "tiny_model/model.safetensors")
    stored = [each for name, each in files.items() if name.endswith("A_log")]
    before = decays(one.run.policy)
    loaded = [each for name, each in before.items() if name.endswith("A_log")]
    assert stored and all(torch.equal(a, b) for a, b in zip(loaded, stored, strict=True))
    assert any(not torch.equal(each, each.bfloat16().float()) for each in loaded)
    one.steps()
    after = decays(one.run.policy)
    for index, layer in enumerate(linear_layers(one.run.policy)):
        for name in DECAYS:
            parameter, value = getattr(layer, name), after[f"{index} {name}"]
            assert parameter.dtype == torch.bfloat16 and value.dtype == torch.float32
            assert torch.equal(value, safe_get_full_fp32_param(parameter))
            assert torch.equal(value.bfloat16(), parameter) and not torch.equal(value, before[f"{index} {name}"])
    save_model(tmp_path / "saved", one.run.policy, one.run.chat, one.run.config.data)
    saved = load_file(tmp_path / "saved/model.safetensors")
    named = [each for name, each in saved.items() if name.endswith("A_log")]
    assert all(torch.equal(a, after[f"{i} A_log"]) for i, a in enumerate(named))
    assert not any(name.endswith(UNROUNDED) for name in saved)
    again = stepper("--model", str(tmp_path / "saved"), *WORDS[4:], "--phases", "sft:1")
    assert all(torch.equal(each, after[name]) for name, each in decays(again.run.policy).items())


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_them(trainer, without_times, tmp_path: Path) -> None:
    words = (*WORDS, "--phases", "sft:1,grpo:3", "--beta", "0.04", "--save_steps", "2")
    whole = trainer.main(tmp_path / "whole", *words)
    assert without_times(trainer.cut_and_resumed(tmp_path / "cut", 2, *words)) == without_times(whole)
    ends = [load_file(latest_checkpoint(tmp_path / name)[0] / "model/model.safetensors") for name in ("whole", "cut")]
    assert all(torch.equal(each, ends[1][name]) for name, each in ends[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_ranks_follow_one_optimizer(trainer, tmp_path: Path, stage: str) -> None:
    words = (*WORDS[:6], "--learning_rate", "1e-3", "--phases", "sft:3", "--save_steps", "3")
    words += ("--gradient_accumulation_steps", "1", "--zero_stage", stage)
    trainer.ranks(tmp_path / "run", 2, *words)
    saved = load_file(latest_checkpoint(tmp_path / "run")[0] / "model/model.safetensors")
    decays = [each for name, each in saved.items() if name.endswith(DECAYS)]
    assert decays and all(each.dtype == torch.float32 for each in decays)
    assert any(not torch.equal(each, each.bfloat16().float()) for each in decays)

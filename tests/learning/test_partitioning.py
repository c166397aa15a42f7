"""ZeRO-3 loading, the packaged DeepSpeed settings, and what an untrained head costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from tempsamp_kernels.head import chunk_rows
from torch.utils.flop_counter import FlopCounterMode

from tempsamp_fast.arguments import RECIPES, parse_args
from tempsamp_fast.config import ModelConfig
from tempsamp_fast.learning import loss
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config
from tempsamp_fast.learning.partitioned import gathered, partitioned_loading, whole_parameters
from tempsamp_fast.model.loading import load_model
from tempsamp_fast.model.packing import pack
from tempsamp_fast.run.schedule import plan

PACKAGED = sorted(path.stem for path in RECIPES.glob("*.json"))


def test_a_checkpoint_in_shards_is_partitioned_as_it_is_loaded(trainer, tmp_path: Path) -> None:
    plain, _ = load_model(str(trainer.checkpoint), ModelConfig(), torch.float32)
    folder = shutil.copytree(trainer.checkpoint, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    plain.save_pretrained(folder, max_shard_size="1MB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    config = parse_args(trainer.flags(tmp_path / "run", "--zero_stage", "3"))
    with partitioned_loading(config.train, torch.float32):
        model, _ = load_model(str(folder), ModelConfig(), torch.float32)
    assert all(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in model.parameters())
    whole = whole_parameters(model)
    for name, weight in plain.named_parameters():
        assert torch.equal(whole[name], weight), name


def test_weights_that_were_gathered_stay_whole_from_pass_to_pass(stepper) -> None:
    """And are parted again when a rollout is done."""
    one = stepper("--phases", "grpo:1", "--zero_stage", "3")
    groups = one.groups(next(plan(one.run.phases)))
    (row, *_) = pack(groups, config=one.run.policy.config, max_tokens_per_row=10_000)
    sizes = lambda: [parameter.numel() for parameter in one.run.policy.parameters()]
    with torch.no_grad(), gathered(one.run.engine) as policy:
        first, second = (policy(row, lambda hidden, weight: hidden) for _ in range(2))
        assert torch.equal(first, second) and all(sizes())
    assert not any(sizes())


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_settings_are_found_by_name_and_known_to_deepspeed(trainer, tmp_path: Path, name: str) -> None:
    config = parse_args(trainer.flags(tmp_path / "run", "--deepspeed_config", name))
    settings = deepspeed_config(config.train, torch.float32)
    zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    assert f"zero{int(zero.stage)}" == name.partition("_")[0]
    assert (zero.offload_optimizer is not None) == name.endswith(("offload", "nvme"))
    assert settings["gradient_clipping"] == config.train.max_grad_norm


def test_there_are_packaged_settings_for_every_stage() -> None:
    assert {name[: len("zero0")] for name in PACKAGED} == {"zero1", "zero2", "zero3"}


@pytest.mark.parametrize(("words", "flops"), [((), 6), (("--lora_rank", "4"), 4)])
def test_an_untrained_head_costs_no_weight_gradient(
    stepper, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], flops: int
) -> None:
    """As torch counts it inside the loss, over padded rows: 6NHV for a trained head, 4NHV beside adapters."""
    counted, original = [], loss.fused_linear_grpo_loss

    def counting(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = original(hidden, weight, *rest, **options)
        num_rows = chunk_rows(len(hidden), len(weight), "cpu")
        counted.append(counter.get_total_flops() / (num_rows * weight.numel()))
        return result

    monkeypatch.setattr(loss, "fused_linear_grpo_loss", counting)
    stepper("--phases", "sft:1", "--loss_impl", "torch", *words).steps()
    assert counted and counted == [flops] * len(counted)

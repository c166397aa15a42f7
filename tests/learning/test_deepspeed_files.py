"""DeepSpeed files as Hugging Face's trainer wants them: "auto" is ours, and what contradicts is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.config import TrainConfig
from tempsamp_fast.config.recipe import RECIPES
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config, effective_zero

HUGGING_FACE: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "reduce_bucket_size": "auto",
        "overlap_comm": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "steps_per_print": 2000,
}


def with_file(tmp_path: Path, content: Any) -> TrainConfig:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return TrainConfig(deepspeed_config=str(path), weight_decay=0.1, adam_beta2=0.95)


def test_auto_is_what_the_run_says(tmp_path: Path) -> None:
    train = with_file(tmp_path, HUGGING_FACE)
    config = deepspeed_config(train, torch.float32)
    assert "auto" not in json.dumps(config) and "scheduler" not in config
    assert config["optimizer"]["params"] | {"betas": [0.9, 0.95], "weight_decay": 0.1} == config["optimizer"]["params"]
    assert config["gradient_clipping"] == train.max_grad_norm and config["gradient_accumulation_steps"] == 1
    assert effective_zero(train) == (2, set())


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_trains_with_the_usual_file(trainer, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "ds.json"
    zero = HUGGING_FACE["zero_optimization"] | {"stage": stage}
    file.write_text(json.dumps(HUGGING_FACE | {"zero_optimization": zero}))
    (row,) = trainer.main(tmp_path / "run", "--phases", "sft:1", "--deepspeed_config", str(file))
    assert row["optim/grad_norm"] > 0 and row["optim/learning_rate"] == 2e-4


NVME = {"device": "nvme"}


def zero(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": settings}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "AdamW", "params": params}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": 2}, "zero_optimization is 2, expected an object"),
        ({"zero_optimization": None}, "zero_optimization is None"),
        (zero(stage="2"), "zero_optimization.stage is '2', must be 0 to 3"),
        (zero(stage=True), "zero_optimization.stage is True"),
        (zero(stage=2.0), "zero_optimization.stage is 2.0"),
        (zero(stage=None), "zero_optimization.stage is None"),
        (zero(stage=3, offload_param="cpu"), "offload_param is 'cpu', expected an object"),
        (zero(stage=3, offload_param={"device": "gpu"}), "offload_param.device is 'gpu', must be none, cpu or nvme"),
        (zero(stage=3, offload_param={"device": ["cpu"]}), "offload_param.device is ['cpu']"),
        (zero(stage=2, offload_param={"device": "cpu"}), "offload_param needs stage 3 or more, this run has 2"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1 or more"),
        (zero(offload_optimizer={"device": "cpu"}), "offload_optimizer needs stage 1 or more, this run has 0"),
        (zero(stage=3, offload_optimizer=NVME), "offload_optimizer.nvme_path is missing"),
        (zero(stage=2, offload_optimiser={"device": "cpu"}), "did you mean 'offload_optimizer'"),
        (zero(stage=2, offload_optimizer={"devise": "cpu"}), "did you mean 'device'"),
        (zero(stage=2, stage_3_max_live_parameters=1), "did you mean 'stage3_max_live_parameters'"),
        (zero(stage=2, overlap_comm="perhaps"), "overlap_comm is 'perhaps'"),
        (zero(stage=2, reduce_bucket_size=-1), "reduce_bucket_size is -1"),
        (zero(stage=2, reduce_bucket_size="many"), "reduce_bucket_size is 'many'"),
        (zero(stage=2, cpu_offload=True), "cpu_offload is True, must be left out"),
        (zero(stage=3, cpu_offload_param=True), "cpu_offload_param is True, must be left out"),
        (zero(stage=2, zenflow={"topk_ratio": 0.1}), "zenflow is {'topk_ratio': 0.1}, must be left out"),
        (zero(stage=2, compute_grad_norm=False), "compute_grad_norm is False, must be true"),
        (zero(stage=3, mics_shard_size=2), "no setting 'zero_optimization.mics_shard_size'"),
        ({"optimizer": "AdamW"}, "optimizer is 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1]"),
        ({"optimizer": {"type": "Adam8bit"}}, "optimizer.type is 'Adam8bit', must be AdamW"),
        ({"optimizer": {"type": ["AdamW"]}}, "optimizer.type is ['AdamW']"),
        ({"optimizer": {"type": None}}, "optimizer.type is None"),
        ({"optimizer": {"name": "AdamW"}}, "no setting 'optimizer.name'"),
        (adam(lr=0.5), "optimizer.params.lr is 0.5, use --learning_rate"),
        (adam(lr="1e-6"), "optimizer.params.lr is '1e-6'"),
        (adam(weight_decay=0.5), "optimizer.params.weight_decay is 0.5, use --weight_decay"),
        (adam(weight_decay=None), "optimizer.params.weight_decay is None"),
        (adam(betas=[0.9, 0.5]), "optimizer.params.betas is [0.9, 0.5], use --adam_beta2"),
        (adam(betas=[0.9]), "optimizer.params.betas is [0.9]"),
        (adam(betas=[0.9, "0.95"]), "optimizer.params.betas is [0.9, '0.95']"),
        (adam(eps=-1), "optimizer.params.eps is -1"),
        (adam(eps=float("nan")), "optimizer.params.eps is nan"),
        (adam(adam_w_mode=False), "optimizer.params.adam_w_mode is False, must be true"),
        (adam(learning_rate=1e-6), "no setting 'optimizer.params.learning_rate'"),
        (adam(weight_decy=0.1), "did you mean 'weight_decay'"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "use --lr_schedule"),
        ({"scheduler": "WarmupLR"}, "scheduler is 'WarmupLR', expected an object"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled: runs are in bf16 or fp32 (--dtype)"),
        ({"fp16": {"enabled": "false"}}, "fp16 is enabled"),
        ({"fp16": True}, "fp16 is True"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "amp is enabled"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is enabled"),
        ({"bf16": True}, "bf16 is True"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled is 'yes', must be true or false"),
        ({"bf16": {"enabled": False, "check_grad_overflow": False}}, "bf16.check_grad_overflow is False"),
        ({"bf16": {"enable": False}}, "did you mean 'enabled'"),
        ({"train_batch_size": 16}, "train_batch_size is 16, use --prompts_per_device"),
        ({"train_batch_size": None}, "train_batch_size is None"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu is True"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, use --gradient_accumulation_steps"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0', use --max_grad_norm"),
        ({"gradient_clipping": -1}, "gradient_clipping is -1"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5"),
        ({"gradient_clipping": True}, "gradient_clipping is True"),
        ({"elasticity": {"enabled": True, "max_train_batch_size": 2000}}, "elasticity is enabled"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is enabled"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency is enabled"),
        ({"wandb": {"enabled": True, "team": "ours"}}, "wandb is enabled: RUN/tensorboard"),
        ({"hybrid_engine": True}, "hybrid_engine is True"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use --gradient_checkpointing"),
        ({"checkpoint": {"load_universal": True}}, "use --save_steps"),
        ({"sparse_gradients": True}, "sparse_gradients is True"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is 2"),
        ({"steps_per_print": "10"}, "steps_per_print is '10'"),
        ({"steps_per_print": 0}, "steps_per_print is 0"),
        ({"wall_clock_breakdown": "false"}, "wall_clock_breakdown is 'false', must be true or false"),
        ({"prescale_gradients": 1}, "prescale_gradients is 1"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0"),
        ({"communication_data_type": "float32"}, "communication_data_type is 'float32', must be fp32, fp16 or bf16"),
        ({"comms_logger": {"enabled": "perhaps"}}, "enabled is 'perhaps'"),
        ({"zero_optimisation": {"stage": 2}}, "no setting 'zero_optimisation'; did you mean 'zero_optimization'"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'"),
        ({"stage": 2}, "no setting 'stage'"),
        ({"x" * 100_000: 1}, "no setting 'xxx"),
        (dict.fromkeys(map(str, range(1000))), "and 996 more"),
        ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "the key 'gradient_clipping' comes twice"),
        ("[" * 100_000, "ds.json"),
        ("{'bf16': 1}", "malformed JSON"),
        (json.dumps(["x" * 100_000]), "expected an object"),
        ("null", "expected an object"),
    ],
)
def test_what_contradicts_the_run_is_one_short_line(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(ValueError) as error:
        deepspeed_config(with_file(tmp_path, content), torch.float32)
    assert named in str(error.value) and "ds.json" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("asked", ["optimizer", "all"])
def test_offloading_that_is_asked_for_is_not_taken_back(tmp_path: Path, asked: str) -> None:
    train = with_file(tmp_path, zero(stage=3, offload_optimizer={"device": "none"}))
    train.offload = asked  # type: ignore[assignment]
    with pytest.raises(ValueError, match=f"offload_optimizer.device is 'none', but --offload is {asked}"):
        deepspeed_config(train, torch.float32)


@pytest.mark.parametrize(("asked", "stage", "least"), [("optimizer", "0", 1), ("all", "0", 3), ("all", "2", 3)])
def test_offloading_in_a_stage_that_cannot_is_refused(asked: Any, stage: Any, least: int) -> None:
    train = TrainConfig(offload=asked, zero_stage=stage)
    named = f"offload='{asked}': needs --zero_stage {least} or more; this run has {stage}"
    with pytest.raises(ValueError, match=named):
        deepspeed_config(train, torch.float32)


@pytest.mark.parametrize(
    "content",
    [
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000}, "amp": {"enabled": False}},
        {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}},
        {"tensorboard": {"enabled": False, "output_path": "logs"}, "flops_profiler": {"enabled": False}},
        {"gradient_clipping": 1, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10},
        adam(lr=1e-6, betas=[0.9, 0.95], weight_decay=0.1, eps=1e-8, torch_adam=True) | {"fp16": {"enabled": False}},
        zero(stage=3, sub_group_size=1e9, stage3_max_live_parameters=1e9, prefetch_bucket_size=5e7, offload_param=None),
        {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}, "wall_clock_breakdown": False},
    ],
)
def test_what_is_usual_and_contradicts_nothing_is_taken(tmp_path: Path, content: Any) -> None:
    config = deepspeed_config(with_file(tmp_path, content), torch.float32)
    assert not {"elasticity", "amp", "fp16", "activation_checkpointing", "tensorboard"} & config.keys()
    passed = set(content) & {"zero_optimization", "communication_data_type", "data_types", "flops_profiler"}
    assert all(config[name] | content[name] == config[name] for name in passed if isinstance(content[name], dict))


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_the_files_of_the_package_are_taken(name: str) -> None:
    settings = json.loads((RECIPES / f"{name}.json").read_text())["zero_optimization"]
    assert deepspeed_config(TrainConfig(deepspeed_config=name), torch.float32)["zero_optimization"] == settings


@pytest.mark.parametrize("content", [{"bf16": {"enabled": True}}, zero(stage=2, overlap_comm="perhaps")])
def test_a_run_ends_with_such_a_line(trainer, refused, tmp_path: Path, content: Any) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    assert "ds.json" in refused(trainer.flags(tmp_path / "run", "--phases", "sft:1", "--deepspeed_config", str(file)))

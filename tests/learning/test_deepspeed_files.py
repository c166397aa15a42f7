"""DeepSpeed files as Hugging Face's trainer wants them: "auto" is ours, and what contradicts is one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.config import TrainConfig
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


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_trains_with_the_usual_file(trainer, tmp_path: Path, stage: int) -> None:
    file = tmp_path / "ds.json"
    zero = HUGGING_FACE["zero_optimization"] | {"stage": stage}
    file.write_text(json.dumps(HUGGING_FACE | {"zero_optimization": zero}))
    (row,) = trainer.main(tmp_path / "run", "--phases", "sft:1", "--deepspeed_config", str(file))
    assert row["optim/grad_norm"] > 0 and row["optim/learning_rate"] == 2e-4


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"zero_optimization": 2}, "zero_optimization is 2, expected an object"),
        ({"zero_optimization": None}, "zero_optimization is None"),
        ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage is '2'"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, "offload_param is 'cpu'"),
        ({"optimizer": "AdamW"}, "optimizer is 'AdamW'"),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params is [1]"),
        ({"optimizer": {"type": "Adam8bit"}}, "optimizer.type is 'Adam8bit', choose AdamW"),
        ({"optimizer": {"type": ["AdamW"]}}, "optimizer.type is ['AdamW']"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "optimizer.params.lr is 0.5, set --learning_rate"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "use --lr_schedule"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled"),
        ({"bf16": True}, "bf16 is True"),
        ({"train_batch_size": 16}, "train_batch_size is 16, use --prompts_per_device"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, use --gradient_accumulation_steps"),
        ("[" * 100_000, "ds.json"),
        (json.dumps(["x" * 100_000]), "expected an object"),
    ],
)
def test_what_contradicts_the_run_is_one_short_line(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(ValueError) as error:
        deepspeed_config(with_file(tmp_path, content), torch.float32)
    assert named in str(error.value) and "ds.json" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "content", [{"bf16": {"enabled": True}}, {"zero_optimization": {"stage": 1, "contiguous_gradients": "perhaps"}}]
)
def test_what_only_deepspeed_can_tell_is_one_line_too(trainer, refused, tmp_path: Path, content: Any) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    line = refused(trainer.flags(tmp_path / "run", "--phases", "sft:1", "--deepspeed_config", str(file)))
    assert "ds.json" in line or "contiguous_gradients" in line

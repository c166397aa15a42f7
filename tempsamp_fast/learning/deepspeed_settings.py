"""DeepSpeed's own configuration of a run: made from its settings, with a file of the user's merged over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.config import TrainConfig
from tempsamp_fast.system.files import read_json

OBJECTS = ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16")
OURS = {
    "train_batch_size": "prompts_per_device and --gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "prompts_per_device",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Of DeepSpeed's settings, those that a run decides itself, and by what."""


def deepspeed_config(train: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration, with `deepspeed_config` merged over it, key by key.

    That is a JSON file, or the name of one in configs/; as in files made for Hugging Face's trainer, "auto" means ours.
    Accumulation is driven row by row by `optimizer_step`, so DeepSpeed is told of single steps.
    Raises ValueError naming a file that cannot be read, and what in it contradicts the run's own settings.
    """
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": int(train.zero_stage), **_offload(train.offload)},
        # Without it, offloading asks for an optimizer that is compiled where the run starts.
        "zero_force_ds_cpu_optimizer": torch.cuda.is_available(),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": [0.9, train.adam_beta2],
                "weight_decay": train.weight_decay,
                "torch_adam": not torch.cuda.is_available(),
            },
        },
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }
    given = _given_settings(train.deepspeed_config)
    wrong = _contradictions(given, generated)
    if wrong:
        raise ValueError(f"deepspeed_config={train.deepspeed_config!r}: {'; '.join(wrong)}")
    given.pop("scheduler", None)
    settings = merged(generated, given)
    stage = settings["zero_optimization"]["stage"]
    least_stage = {"none": 0, "optimizer": 1, "all": 3}[train.offload]
    if stage < least_stage:
        raise ValueError(f"offload={train.offload!r}: needs --zero_stage {least_stage} or more; this run has {stage}")
    if torch.cuda.is_available():
        if stage < least_zero_stage(dtype):
            raise ValueError(f"zero_stage={stage}: bfloat16 on a GPU needs 1 or more; set it, or --dtype float32")
        if (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") == "none":
            settings["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # its own compiles for a minute
    return settings


def least_zero_stage(dtype: torch.dtype) -> int:
    """Stage 0 keeps bfloat16 weights by other optimizers on a GPU than on a CPU."""
    return 1 if dtype == torch.bfloat16 and torch.cuda.is_available() else 0


def effective_zero(train: TrainConfig) -> tuple[int, set[str]]:
    """The ZeRO stage, and which of "optimizer" and "param" are offloaded, once `deepspeed_config` has had its say.

    Raises ValueError as `deepspeed_config` does.
    """
    zero = deepspeed_config(train, torch.float32)["zero_optimization"]
    devices = {part: (zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")}
    return zero["stage"], {part for part, device in devices.items() if device != "none"}


def _given_settings(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    packaged = Path(__file__).parents[1] / "configs" / f"{name}.json"
    try:
        given = read_json(packaged if packaged.is_file() else Path(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"deepspeed_config={name!r}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"deepspeed_config={name!r}: expected an object, found {given!r:.80}")
    return _without_auto(given)


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in given.items()
        if value != "auto"
    }


def _contradictions(given: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What a DeepSpeed file says that a run cannot follow, each with what to set in its place."""
    zero, optimizer, scheduler = (given.get(name, {}) for name in ("zero_optimization", "optimizer", "scheduler"))
    sections: dict[str, Any] = {name: given[name] for name in OBJECTS if name in given}
    if isinstance(zero, dict):
        parts = ("offload_optimizer", "offload_param")
        sections |= {f"zero_optimization.{part}": zero[part] for part in parts if zero.get(part) is not None}
    if isinstance(optimizer, dict) and "params" in optimizer:
        sections["optimizer.params"] = optimizer["params"]
    wrong = [
        f"{name} is {value!r:.80}, expected an object" for name, value in sections.items() if type(value) is not dict
    ]
    if wrong:
        return wrong
    stage, kind = zero.get("stage", 0), optimizer.get("type", "AdamW")
    rate = optimizer.get("params", {}).get("lr", ours["optimizer"]["params"]["lr"])
    checks = {
        f"zero_optimization.stage is {stage!r:.80}, choose 0 to 3": type(stage) is int and 0 <= stage <= 3,
        f"optimizer.type is {kind!r:.80}, choose AdamW": kind in ("AdamW", "Adam"),
        f"optimizer.params.lr is {rate!r:.80}, set --learning_rate": rate == ours["optimizer"]["params"]["lr"],
        "scheduler has settings of its own, use --lr_schedule and --warmup_ratio": not scheduler.get("params"),
        "fp16 is enabled, runs are in bf16 or fp32 (--dtype)": not given.get("fp16", {}).get("enabled"),
    }
    for name, setting in OURS.items():
        value = given.get(name, ours.get(name))
        checks[f"{name} is {value!r:.80}, use --{setting}"] = value == ours.get(name)
    return [text for text, holds in checks.items() if not holds]


def _offload(what: str) -> dict[str, Any]:
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    parts = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}[what]
    return dict.fromkeys(parts, to_cpu)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `over` has in its place, key by key in objects within objects."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], dict)}
    return {**base, **over, **both}

"""DeepSpeed's own configuration of a run, and what a file of the user's may say in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.config import TrainConfig
from tempsamp_fast.config.setting import did_you_mean
from tempsamp_fast.data.text_files import parse_json, read_text, shown

OBJECTS = ("zero_optimization", "optimizer", "scheduler", "bf16", "aio", "data_types", "comms_logger", "flops_profiler")
"""Sections of a file that DeepSpeed is given, but for `scheduler`."""
PARTS = ("optimizer.params", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
"""Objects inside them."""
DECIDED = {
    "train_batch_size": "prompts_per_device and --gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "prompts_per_device",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas": "adam_beta2 (the first is 0.9)",
    "optimizer.params.weight_decay": "weight_decay",
}
"""What a run decides itself, and by which setting."""
_NOT_HERE = "this trainer does without; leave it out"
SWITCHED = {
    **dict.fromkeys(("fp16", "amp", "torch_autocast"), "runs are in bf16 or fp32 (--dtype)"),
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), "RUN/tensorboard and metrics.jsonl are written"),
    **dict.fromkeys(
        ("autotuning", "elasticity", "hybrid_engine", "data_efficiency", "curriculum_learning", "nebula", "eigenvalue",
         "progressive_layer_drop", "quantize_training", "expert_parallel", "datastates_config"),
        _NOT_HERE,
    ),
}  # fmt: skip
"""Sections that may stand in a file as long as they are not `enabled`, and what holds in their place."""
UNUSED = {
    "activation_checkpointing": "use --gradient_checkpointing",
    "checkpoint": "use --save_steps and --save_minutes",
    **dict.fromkeys(
        ("compile", "tensor_parallel", "pipeline", "sparse_attention", "sparse_gradients", "gradient_allreduce_op",
         "compression_training", "weight_quantization", "sequence_parallel_size", "graph_harvesting",
         "seq_parallel_communication_data_type", "managed_gradient_accumulation", "dataloader_drop_last"),
        _NOT_HERE,
    ),
}  # fmt: skip
"""Those that may stand there as long as they say nothing but false, 0 or null."""
Rule = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words and as a check."""


def _number(least: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value < math.inf


_SWITCH: Rule = ("true or false", lambda value: type(value) is bool)
_ON: Rule = ("true", lambda value: value is True)
_OFF: Rule = ("left out", lambda value: not value)
RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients", "disable_allgather",
         "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "bf16.enabled", "optimizer.params.torch_adam",
         "optimizer.params.fused"),
        _SWITCH,
    ),
    **dict.fromkeys(
        ("zero_optimization.compute_grad_norm", "bf16.check_grad_overflow", "optimizer.params.adam_w_mode"), _ON
    ),
    **dict.fromkeys(
        ("zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param", "zero_optimization.zenflow"), _OFF
    ),
    "steps_per_print": ("1 or more", _number(1)),
    "gradient_predivide_factor": ("a number above 0", _number(math.ulp(0.0))),
    "optimizer.params.eps": ("a number from 0 up", _number(0)),
    "optimizer.type": ("AdamW", lambda value: value in ("AdamW", "Adam", "adamw", "adam")),
    "communication_data_type": ("fp32, fp16 or bf16", lambda value: value in (None, "fp32", "fp16", "bf16")),
    "zero_optimization.stage": ("0 to 3", lambda value: type(value) is int and 0 <= value <= 3),
}  # fmt: skip
"""Of single values, by their place. What must be on or left out would change what a step is, or what is planned."""


def deepspeed_config(train: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration, with `deepspeed_config` merged over it, key by key.

    That is a JSON file, or the name of one in configs/; as in files made for Hugging Face's trainer, "auto" means ours.
    Accumulation is driven row by row by `optimizer_step`, so DeepSpeed is told of single steps.
    Raises ValueError naming a file that cannot be read, and what in it is unknown, of another kind than it must be, or
    contradicts the run's own settings.
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
    settings = _with_file(generated, train) if train.deepspeed_config is not None else generated
    stage = settings["zero_optimization"]["stage"]
    least_stage = {"none": 0, "optimizer": 1, "all": 3}[train.offload]
    if stage < least_stage:
        raise ValueError(f"offload={train.offload!r}: needs --zero_stage {least_stage} or more; this run has {stage}")
    if torch.cuda.is_available():
        if stage < least_zero_stage(dtype, has_gpu=True):
            raise ValueError(f"zero_stage={stage}: bfloat16 on a GPU needs 1 or more; set it, or --dtype float32")
        if _device(settings["zero_optimization"], "optimizer") == "none":
            settings["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # its own compiles for a minute
    return settings


def least_zero_stage(dtype: torch.dtype, has_gpu: bool) -> int:
    """The lowest ZeRO stage a run may take: at 0, bfloat16 has other optimizers on a GPU than on a CPU."""
    return 1 if dtype == torch.bfloat16 and has_gpu else 0


def effective_zero(train: TrainConfig) -> tuple[int, set[str]]:
    """The ZeRO stage, and which of "optimizer" and "param" are offloaded, once `deepspeed_config` has had its say.

    Raises ValueError as `deepspeed_config` does.
    """
    zero = deepspeed_config(train, torch.float32)["zero_optimization"]
    return zero["stage"], {part for part in ("optimizer", "param") if _device(zero, part) != "none"}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with what `over` has in its place, key by key in objects within objects."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], dict)}
    return {**base, **over, **both}


def _offload(what: str) -> dict[str, Any]:
    to_cpu = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    parts = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}[what]
    return dict.fromkeys(parts, to_cpu)


def _device(zero: dict[str, Any], part: str) -> str:
    return (zero.get(f"offload_{part}") or {}).get("device", "none")


def _with_file(generated: dict[str, Any], train: TrainConfig) -> dict[str, Any]:
    name = train.deepspeed_config
    where = f"deepspeed_config={name!r}"
    packaged = Path(__file__).parents[1] / "configs" / f"{name}.json"
    path = packaged if packaged.is_file() else Path(str(name))
    try:
        given = parse_json(str(path), read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{where}: expected an object, found {shown(given)}")
    given = _without_auto(given)
    settings = generated
    wrong = _of_other_kinds(given) or [*_unknown(given), *_contradictions(given, generated)]
    if not wrong:
        passed = {name: value for name, value in given.items() if name in OBJECTS or name in RULES}
        passed.pop("scheduler", None)
        settings = merged(generated, passed)
        zero = settings["zero_optimization"]
        wrong = [*_offload_contradictions(zero, train.offload), *_refused_by_deepspeed(settings)]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{where}: {'; '.join(wrong[:4])}{more}")
    return settings


def _without_auto(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in given.items()
        if value != "auto"
    }


def _places(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its place, `optimizer.params.lr`, objects too."""
    for name, value in settings.items():
        yield f"{above}{name}", value
        if isinstance(value, dict):
            yield from _places(value, f"{above}{name}.")


def _of_other_kinds(given: dict[str, Any]) -> list[str]:
    return [
        f"{place} is {shown(value)}, expected an object"
        for place, value in _places(given)
        if not isinstance(value, dict) and (place in OBJECTS or (place in PARTS and value is not None))
    ]


def _unknown(given: dict[str, Any]) -> list[str]:
    """Names that no section has, each with the one that was probably meant."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    zero = "zero_optimization."
    models: dict[str, Any] = {
        "bf16.": DeepSpeedBF16Config,
        zero: DeepSpeedZeroConfig,
        f"{zero}offload_optimizer.": DeepSpeedZeroOffloadOptimizerConfig,
        f"{zero}offload_param.": DeepSpeedZeroOffloadParamConfig,
    }
    known: dict[str, set[str]] = {"": {*OBJECTS, *SWITCHED, *UNUSED}, "optimizer.": {"params"}}
    for above, model in models.items():
        known[above] = {name for field, each in model.model_fields.items() for name in (field, each.alias) if name}
    for place in (*DECIDED, *RULES):
        above, _, name = place.rpartition(".")
        known.setdefault(f"{above}." if above else "", set()).add(name)
    found = []
    for place, _ in _places(given):
        above, dot, name = place.rpartition(".")
        if name not in known.get(above + dot, {name}):
            found.append(f"no setting {shown(place)}{did_you_mean(name, sorted(known[above + dot]))}")
    return found


def _contradictions(given: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """What a run cannot follow, each with what to set in its place."""
    decided = dict(_places(ours))
    said = dict(_places(given))
    wrong = []
    for place, value in said.items():
        if place in DECIDED and not _is_same(value, decided.get(place)):
            wrong.append(f"{place} is {shown(value)}, use --{DECIDED[place]}")
        elif place in RULES and not RULES[place][1](value):
            wrong.append(f"{place} is {shown(value)}, must be {RULES[place][0]}")
    for name, value in given.items():
        is_object = isinstance(value, dict)
        if name in SWITCHED and (value.get("enabled") if is_object else value):
            wrong.append(f"{name} is {'enabled' if is_object else shown(value)}: {SWITCHED[name]}")
        if name in UNUSED and (any(value.values()) if is_object else value):
            wrong.append(f"{name} is {shown(value)}: {UNUSED[name]}")
    if given.get("scheduler", {}).get("params"):
        wrong.append("scheduler has settings of its own, use --lr_schedule and --warmup_ratio")
    return wrong


def _is_same(value: Any, ours: Any) -> bool:
    """As a number, or as a list of them."""
    if isinstance(value, list) and isinstance(ours, list):
        return len(value) == len(ours) and all(map(_is_same, value, ours))
    return type(value) in (int, float) and value == ours


def _offload_contradictions(zero: dict[str, Any], asked: str) -> Iterator[str]:
    for part, least_stage in (("optimizer", 1), ("param", 3)):
        place, device = f"zero_optimization.offload_{part}", _device(zero, part)
        if device not in ("none", "cpu", "nvme"):
            yield f"{place}.device is {shown(device)}, must be none, cpu or nvme"
        elif device != "none" and zero["stage"] < least_stage:
            yield f"{place} needs stage {least_stage} or more, this run has {zero['stage']}"
        elif device == "nvme" and not zero[f"offload_{part}"].get("nvme_path"):
            yield f"{place}.nvme_path is missing"
        elif device == "none" and f"offload_{part}" in _offload(asked):
            yield f"{place}.device is 'none', but --offload is {asked}"


def _refused_by_deepspeed(settings: dict[str, Any]) -> list[str]:
    """What DeepSpeed itself says of a configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from pydantic import ValidationError

    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        return [
            f"{'.'.join(map(str, each['loc']))} is {shown(each['input'])}: {each['msg'][:100]}"
            for each in error.errors()
        ]
    except (AssertionError, TypeError, AttributeError, KeyError, ValueError, DeepSpeedConfigError) as error:
        return [f"DeepSpeed refuses it: {(str(error) or type(error).__name__).splitlines()[0]:.200}"]
    return []

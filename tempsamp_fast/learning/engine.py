"""The DeepSpeed engine: how it is configured, one optimizer step over packed rows, and the learning rate."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempsamp_fast.config import Phase, TrainConfig
from tempsamp_fast.model.linear_layers import linear_layers
from tempsamp_fast.model.packing import PackedRow, idle_row
from tempsamp_fast.model.policy import Head
from tempsamp_fast.system.files import read_json
from tempsamp_fast.system.ranks import is_first_rank, max_over_ranks, num_ranks
from tempsamp_fast.system.stopwatch import Stopwatch

STATE = "state"
"""DeepSpeed's tag of the only checkpoint in an engine folder."""
SETTINGS = ("betas", "weight_decay")
"""Of an optimizer's parameter groups: what a run may be resumed with another value of; each step has its own rate."""
OBJECTS = ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16")
OURS = {
    "train_batch_size": "prompts_per_device and --gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "prompts_per_device",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
}
"""Of DeepSpeed's settings, those that a run decides itself, and by what."""
Forward = Callable[..., Any]
"""`(row, head) -> head(hidden, weight)`, as of `Policy`."""


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
    merged = _merged(generated, given)
    stage = merged["zero_optimization"]["stage"]
    least_stage = {"none": 0, "optimizer": 1, "all": 3}[train.offload]
    if stage < least_stage:
        raise ValueError(f"offload={train.offload!r}: needs --zero_stage {least_stage} or more; this run has {stage}")
    if torch.cuda.is_available():
        if stage < least_zero_stage(dtype):
            raise ValueError(f"zero_stage={stage}: bfloat16 on a GPU needs 1 or more; set it, or --dtype float32")
        if (merged["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") == "none":
            merged["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # its own compiles for a minute
    return merged


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


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], dict)}
    return {**base, **over, **both}


def build_engine(policy: nn.Module, train: TrainConfig, dtype: torch.dtype, *, load_universal: bool = False) -> Any:
    """A DeepSpeed engine over the trainable parameters of `policy`.

    load_universal: its state will be loaded from a universal checkpoint.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    settings = _merged(deepspeed_config(train, dtype), {"checkpoint": {"load_universal": load_universal}})
    if settings["bf16"]["enabled"] is not (dtype == torch.bfloat16):
        raise ValueError(
            f"deepspeed_config={train.deepspeed_config!r}: bf16.enabled is {settings['bf16']['enabled']!r}, but the "
            f"run is in {str(dtype).removeprefix('torch.')}: leave it out, or set --dtype"
        )
    gather_with_their_readers(policy)
    buffers = {name: buffer.dtype for name, buffer in policy.named_buffers()}
    try:
        engine, _, _, _ = deepspeed.initialize(model=policy, model_parameters=trainable, config=settings)
    except (AssertionError, TypeError, AttributeError, KeyError, DeepSpeedConfigError) as error:
        if train.deepspeed_config is None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"deepspeed_config={train.deepspeed_config!r}: DeepSpeed refuses it: {reason:.200}") from error
    for name, buffer in policy.named_buffers():
        if buffer.dtype != buffers.get(name, buffer.dtype):
            raise ValueError(f"deepspeed {deepspeed.__version__} rounds {name}, and positions with it; install 0.19")
    return engine


def gather_with_their_readers(policy: nn.Module) -> None:
    """Have ZeRO-3 gather weights that are read outside of their own module's forward; before its engine is built."""
    import deepspeed

    for layer in linear_layers(policy):
        deepspeed.zero.register_external_parameter(layer, layer.conv1d.weight)


def save_engine(engine: Any, folder: Path, has_all_weights: bool) -> None:
    """Write the engine's state for `load_engine`; called by every rank.

    has_all_weights: with the frozen weights too.
    """
    engine.save_checkpoint(str(folder), tag=STATE, exclude_frozen_parameters=not has_all_weights)


def load_engine(engine: Any, folder: Path, allow_pickle: bool, has_all_weights: bool) -> None:
    """Load the engine's state as a checkpoint holds it, refusing pickles that would run code unless `allow_pickle`.

    Weight decay and betas stay those of the engine's own configuration.

    has_all_weights: whether it was saved with the frozen weights too.
    Raises ValueError naming the file that holds more than tensors, plain values and DeepSpeed's own records.
    """
    if not allow_pickle:
        engine.checkpoint_engine.load = load_without_code
    configured = [{name: group[name] for name in SETTINGS if name in group} for group in engine.optimizer.param_groups]
    engine.load_checkpoint(str(folder), tag=STATE, load_module_strict=has_all_weights)
    for group, settings in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update(settings)


def load_without_code(path: str, map_location: Any = None) -> Any:
    """`torch.load` of a file of DeepSpeed's; ValueError naming it when it holds more than `load_engine` allows."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"{path}: holds more than tensors; --allow_pickle loads it anyway ({reason})") from error


@contextmanager
def partitioned_loading(train: TrainConfig, dtype: torch.dtype) -> Iterator[None]:
    """Under ZeRO stage 3 `from_pretrained` inside partitions each parameter as it is made: no rank holds all."""
    settings = deepspeed_config(train, dtype)
    if settings["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    kept_alive = HfDeepSpeedConfig(settings)  # transformers finds it through a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept_alive


def is_partitioned(module: nn.Module) -> bool:
    """Whether each rank holds only a part of every parameter (ZeRO stage 3)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def forward_of(engine: Any) -> Forward:
    """The policy of an engine, or the engine itself where only that can gather partitioned parameters."""
    return engine if engine.zero_optimization_partition_weights() else engine.module


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The state of `module` on the CPU of rank 0, parameters gathered one by one; called by every rank.

    Empty on the other ranks. Tied parameters stay tied.
    """
    import deepspeed

    is_first = is_first_rank()
    whole: dict[int, Tensor] = {}
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:
            with deepspeed.zero.GatheredParameters([tensor]):
                whole[id(tensor)] = tensor.detach().to("cpu", copy=True) if is_first else tensor.new_empty(0)
        if is_first:
            state[name] = whole[id(tensor)]
    return state


def learning_rate(train: TrainConfig, phase: Phase, step_in_phase: int) -> float:
    """The rate of one step: linear warm-up over `warmup_ratio` of the phase, then `lr_schedule` down to a tenth."""
    peak = train.learning_rate if phase.learning_rate is None else phase.learning_rate
    num_warmup = math.ceil(train.warmup_ratio * phase.num_steps)
    if step_in_phase < num_warmup:
        return peak * (step_in_phase + 1) / num_warmup
    progress = (step_in_phase - num_warmup) / max(1, phase.num_steps - num_warmup)
    if train.lr_schedule == "cosine":
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
    if train.lr_schedule == "linear":
        return peak * (1 - 0.9 * progress)
    return peak


def in_step(engine: Any, rows: Sequence[PackedRow]) -> list[PackedRow]:
    """This rank's rows, and idle ones after them: as many as the rank with the most rows has, and at least one."""
    num_rounds = max(1, max_over_ranks(len(rows), engine.device))
    idle = idle_row(engine.module.config, has_features=engine.module.has_frozen_tower)
    return [*rows, *[idle] * (num_rounds - len(rows))]


def optimizer_step(
    engine: Any, rows: Sequence[PackedRow], heads: Sequence[Head], rate: float, watch: Stopwatch
) -> tuple[list[Any], float]:
    """Accumulate the gradients of all rows, then update once. Every rank must have as many rows: see `in_step`.

    heads: each gives (loss, metrics).
    Returns the metrics of each row, and the norm of the whole gradient before clipping. Where it is not finite, or a
    row's loss is not, no rank updates, and the norm is infinite or NaN. Raises RowsTooLargeError on every rank, nothing
    updated, when a row of any rank did not fit the memory.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    metrics, too_large = [], False
    for index, (row, head) in enumerate(zip(rows, heads, strict=True)):
        is_last = index == len(rows) - 1
        row_metrics, fitted = _forward_backward(engine, row, head, is_last)
        too_large = too_large or not fitted
        if is_last:
            plain_norm = _plain_gradient_norm(engine)
            watch.lap("forward_backward")
        if is_last and plain_norm is not None and not plain_norm.isfinite():
            engine.zero_grad()  # DeepSpeed's own optimizers skip such a step themselves
        else:
            engine.step()
        metrics.append(row_metrics)
    watch.lap("optimizer")
    grad_norm = float(engine.get_global_grad_norm() if plain_norm is None else plain_norm)
    if not math.isfinite(grad_norm):
        check_fitted(rows, not too_large, engine.device)
    return metrics, grad_norm


def check_fitted(rows: Sequence[PackedRow], fitted: bool, device: torch.device) -> None:
    """Raise RowsTooLargeError on every rank when this rank's rows, or those of another, did not fit the memory."""
    if max_over_ranks(int(not fitted), device):
        raise RowsTooLargeError(max_over_ranks(max(row.num_tokens for row in rows), device))


class RowsTooLargeError(RuntimeError):
    """A row of some rank did not fit the memory of its device; `num_tokens` has the longest row of all ranks."""

    def __init__(self, num_tokens: int):
        super().__init__(f"out of memory with rows of up to {num_tokens} tokens")
        self.num_tokens = num_tokens


def _forward_backward(engine: Any, row: PackedRow, head: Head, is_last: bool) -> tuple[Any, bool]:
    """Add a row's gradients; returns its metrics and whether it fitted the memory.

    One that did not is replaced by an idle row whose gradient is NaN: the collectives of the other ranks meet it, and
    no rank updates. Where other ranks wait inside the pass that failed (the backward pass of ZeRO-1 and ZeRO-2) nothing
    can meet them, and in ZeRO-3 gathering cannot begin anew: the error is raised.
    """
    stage = engine.zero_optimization_stage()
    try:
        loss, metrics = engine(row.to(engine.device), head)
    except torch.OutOfMemoryError:
        if stage == 3:
            raise
        loss, metrics = None, None
    engine.set_gradient_accumulation_boundary(is_last)
    if loss is not None:
        try:
            # Exactly the loss while it is finite; a gradient of NaN otherwise.
            engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            return metrics, True
        except torch.OutOfMemoryError:
            if stage == 3 or (stage > 0 and num_ranks() > 1):
                raise
        if stage > 0:
            _end_backward(engine.optimizer)
    del loss
    idle = idle_row(engine.module.config, has_features=engine.module.has_frozen_tower)
    engine.backward(engine(idle.to(engine.device), lambda hidden, weight: torch.nan * (hidden @ weight.T).sum()))
    return None, False


def _end_backward(optimizer: Any) -> None:
    """Let ZeRO-1 or ZeRO-2 take another backward pass after one that was interrupted.

    Of that one, sums of gradients in part may be left; DeepSpeed drops them with the step when NaN is added.
    """
    optimizer.exit_backward()
    optimizer.zero_grad()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear()
    optimizer.extra_large_param_to_reduce.clear()
    optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)
    optimizer._release_ipg_buffers()


def _plain_gradient_norm(engine: Any) -> Tensor | None:
    """Of gradients that lie whole in their parameters: DeepSpeed clips such without keeping their norm.

    None where its own optimizer (ZeRO, bf16) holds the gradients; that one does keep it.
    """
    if hasattr(engine.optimizer, "_global_grad_norm"):
        return None
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])

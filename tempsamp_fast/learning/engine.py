"""The DeepSpeed engine: its state on disk, one optimizer step over packed rows, and the learning rate."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempsamp_fast.config import Phase, TrainConfig
from tempsamp_fast.learning.decays import decays_of, follow_optimizer, keep_decays
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config, merged
from tempsamp_fast.learning.partitioned import gather_with_their_readers
from tempsamp_fast.model.packing import PackedRow, idle_row
from tempsamp_fast.model.policy import Head
from tempsamp_fast.model.sequence_parallel import share_out
from tempsamp_fast.system.ranks import max_over_ranks, num_ranks, of_all_ranks
from tempsamp_fast.system.stopwatch import Stopwatch

STATE = "state"
"""DeepSpeed's tag of the only checkpoint in an engine folder."""
SETTINGS = ("betas", "weight_decay")
"""Of an optimizer's parameter groups: what a run may be resumed with another value of; each step has its own rate."""


def build_engine(policy: nn.Module, train: TrainConfig, dtype: torch.dtype, *, load_universal: bool = False) -> Any:
    """A DeepSpeed engine over the trainable parameters of `policy`.

    load_universal: its state will be loaded from a universal checkpoint.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    settings = merged(deepspeed_config(train, dtype), {"checkpoint": {"load_universal": load_universal}})
    if settings["bf16"]["enabled"] is not (dtype == torch.bfloat16):
        raise ValueError(
            f"deepspeed_config={train.deepspeed_config!r}: bf16.enabled is {settings['bf16']['enabled']!r}, but the "
            f"run is in {str(dtype).removeprefix('torch.')}: leave it out, or set --dtype"
        )
    gather_with_their_readers(policy)
    decays = decays_of(policy) if dtype == torch.bfloat16 else []
    buffers = {name: buffer.dtype for name, buffer in policy.named_buffers()}
    try:
        engine, _, _, _ = deepspeed.initialize(model=policy, model_parameters=trainable, config=settings)
    except (AssertionError, TypeError, AttributeError, KeyError, ValueError, DeepSpeedConfigError) as error:
        if train.deepspeed_config is None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"deepspeed_config={train.deepspeed_config!r}: DeepSpeed refuses it: {reason:.200}") from error
    for name, buffer in policy.named_buffers():
        if buffer.dtype != buffers.get(name, buffer.dtype):
            raise ValueError(f"deepspeed {deepspeed.__version__} rounds {name}, and positions with it; install 0.19")
    keep_decays(engine, decays)
    return engine


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
    follow_optimizer(engine)


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


def in_step(engine: Any, rows: Sequence[PackedRow], sequence_group: Any = None) -> list[PackedRow]:
    """This rank's rows, and idle ones after them: as many as the rank with the most rows has, and at least one.

    Under ZeRO-3, where every pass through a layer gathers its weights on all ranks together, with idle stages too.

    sequence_group: whose ranks share rows out; each gives its shares of the same rows.
    """
    num_rounds = max(1, max_over_ranks(len(rows), engine.device))
    idle = idle_row(engine.module.config, has_features=engine.module.has_frozen_tower)
    if sequence_group:
        idle = share_out(idle, sequence_group, engine.module.config)
    rows = [*rows, *[idle] * (num_rounds - len(rows))]
    if engine.zero_optimization_stage() < 3:
        return rows
    num_stages = [max(1, len(row.stages)) for row in rows]
    most = map(max, zip(*of_all_ranks(num_stages), strict=True))
    return [replace(row, idle_stages=n - own) for row, own, n in zip(rows, num_stages, most, strict=True)]


def optimizer_step(
    engine: Any,
    rows: Sequence[PackedRow],
    heads: Sequence[Head],
    rate: float,
    watch: Stopwatch,
    reduces_once: bool = True,
) -> tuple[list[Any], float]:
    """Accumulate the gradients of all rows, then update once. Every rank must have as many rows: see `in_step`.

    heads: each gives (loss, metrics).
    reduces_once: have ZeRO-2 sum gradients over ranks in the last row's pass alone, as stages 0 and 1 do anyway; ZeRO-3
        sums those of every row.
    Returns the metrics of each row, and the norm of the whole gradient before clipping. Where it is not finite, or a
    row's loss is not, no rank updates, and the norm is infinite or NaN. Raises RowsTooLargeError on every rank, nothing
    updated, when a row of any rank did not fit the memory.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    metrics, too_large = [], False
    for index, (row, head) in enumerate(zip(rows, heads, strict=True)):
        is_last = index == len(rows) - 1
        is_local = reduces_once and not is_last and engine.zero_optimization_stage() == 2
        with _summed_later(engine) if is_local else nullcontext():
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
    follow_optimizer(engine)
    watch.lap("optimizer")
    grad_norm = float(engine.get_global_grad_norm() if plain_norm is None else plain_norm)
    if not math.isfinite(grad_norm):
        check_fitted(rows, not too_large, engine.device)
    return metrics, grad_norm


@contextmanager
def _summed_later(engine: Any) -> Iterator[None]:
    """Passes whose gradients add up here, whole, until that of the last row sums them over ranks as it goes.

    As in `engine.coalesce_grad_reduction`, which sums after the last pass and so not beside it.
    """
    optimizer = engine.optimizer
    engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = True
    try:
        yield
    finally:
        engine.inside_no_sync_ctxt = optimizer._coalesce_grad_reduction = False


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
    can meet them, or in the layers of a row that ranks share, and in ZeRO-3 gathering cannot begin anew: the error is
    raised.
    """
    stage = engine.zero_optimization_stage()
    cannot_be_met = stage == 3 or row.shares is not None
    try:
        loss, metrics = engine(row.to(engine.device), head)
    except torch.OutOfMemoryError:
        if cannot_be_met:
            raise
        loss, metrics = None, None
    engine.set_gradient_accumulation_boundary(is_last)
    if loss is not None:
        try:
            # Exactly the loss while it is finite; a gradient of NaN otherwise.
            engine.backward(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan))
            return metrics, True
        except torch.OutOfMemoryError:
            if cannot_be_met or (stage > 0 and num_ranks() > 1):
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

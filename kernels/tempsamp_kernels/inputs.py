"""What users give: checked, and spread over tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempsamp_kernels.objectives import SELF

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {choices}")


def check_vector(name: str, value: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError where `value` is not [size], or not of `dtype`."""
    if value.shape != (size,):
        raise ValueError(f"{name} must be ({size},); got {tuple(value.shape)}")
    if dtype is not None and value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}; got {value.dtype}")


def check_positive(**values: float | Tensor | None) -> None:
    """Raise ValueError for one that is not positive, where it can be seen without waiting for a device."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = float(value.min()) if on_host(value) and value.numel() else None
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def check_head(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None, chunk_size: int | None = None
) -> None:
    """Raise ValueError where shapes or dtypes do not make a head."""
    if hidden.dtype not in FLOATS:
        raise ValueError(f"hidden must be float32, bfloat16 or float16; got {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]}; got {tuple(weight.shape)} "
            "(gather a sharded head, and pass the inner weight of a wrapped one)"
        )
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weight must have a floating dtype; got {weight.dtype}: pass it dequantised")
    if type(weight.data) is not Tensor:
        raise ValueError(f"weight must be a plain tensor; got {type(weight.data).__name__}: pass its full tensor")
    if token_ids.shape != hidden.shape[:-1]:
        raise ValueError(f"token_ids must be {tuple(hidden.shape[:-1])} like hidden; got {tuple(token_ids.shape)}")
    if token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids must be torch.int64; got {token_ids.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}; got {tuple(bias.shape)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")


def check_token_ids(token_ids: Tensor, mask: Tensor | None, vocab_size: int) -> None:
    """Raise ValueError for an unmasked id outside the vocabulary, where it can be seen without waiting for a device."""
    if not on_host(token_ids, mask):
        return
    ids = token_ids if mask is None else token_ids[mask]
    if not ids.numel():
        return
    least, largest = (int(extreme) for extreme in ids.aminmax())
    if least < 0 or largest >= vocab_size:
        raise ValueError(f"token_ids must be in [0, {vocab_size}); got {least if least < 0 else largest}")


def count_rows(by_row: dict[str, Tensor | None], by_row_or_token: dict[str, Any], num_tokens: int) -> int | None:
    """How many completions the vectors speak of, None where none says.

    `by_row` hold one value per completion; the others may also hold one per token, which a length of N means unless
    there are N completions. Raises ValueError where they contradict each other.
    """
    given = {name: value for name, value in by_row.items() if value is not None}
    for name, value in given.items():
        if value.ndim != 1:
            raise ValueError(f"{name} must be [B], one value per completion; got shape {tuple(value.shape)}")
    lengths = {name: len(value) for name, value in given.items()}
    vectors = {name: value for name, value in by_row_or_token.items() if isinstance(value, Tensor) and value.ndim == 1}
    lengths |= {name: len(value) for name, value in vectors.items() if len(value) != num_tokens}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"these must hold one value per completion, as many as each other: {lengths}")
    return next(iter(lengths.values()), None)


def spread(name: str, value: float | Tensor, row_ids: Tensor, num_rows: int | None, level: str | None = None) -> Tensor:
    """[N] fp32 from a number, one value per completion [num_rows], or one per token [N]: by `level` or by length."""
    num_tokens, device = len(row_ids), row_ids.device
    if not isinstance(value, Tensor):
        return torch.full((num_tokens,), float(value), device=device)
    value = value.detach().to(device, torch.float32, non_blocking=True)
    if value.ndim == 0:
        return value.expand(num_tokens).contiguous()
    if value.ndim != 1:
        raise ValueError(f"{name} must be a number, [B] or [N]; got shape {tuple(value.shape)}")
    if level is None:
        level = "row" if len(value) == num_rows else "token"
    if len(value) != (num_rows if level == "row" else num_tokens):
        expected = f"one value per completion ({num_rows})" if level == "row" else f"one value per token ({num_tokens})"
        raise ValueError(f"{name} must hold {expected}; got {len(value)}")
    return value[row_ids] if level == "row" else value.contiguous()


def known_logps(logps: Tensor | None, known: Tensor, name: str) -> Tensor:
    """[N] fp32 log-probs, `SELF` where there are none or `known` [N] bool is False."""
    if logps is None:
        return torch.full(known.shape, SELF, device=known.device)
    check_vector(name, logps, len(known))
    return logps.detach().to(known.device, torch.float32, non_blocking=True).masked_fill(~known, SELF)


def on_host(*tensors: Tensor | None) -> bool:
    """Whether all values can be looked at without waiting for a device, or for torch.compile's tracing to end."""
    on_cpu = all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and not torch.compiler.is_compiling()

"""What the row kernels read and write: one value per packed token, in flat fp32 vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import triton
from torch import Tensor
from torch.nn import functional

from tempsamp_kernels.objectives import SELF

TERMS = ("logp", "entropy", "loss", "kl", "ratio", "clip_low", "clip_high")
"""Rows of the table that a loss evaluation leaves behind; `loss` is weighted, so its sum is the loss."""
NUM_TERMS = len(TERMS)


@dataclass(frozen=True)
class Tokens:
    """The inputs of N tokens; every field is [N], float32 unless said otherwise."""

    token_ids: Tensor
    """int64."""
    temperature: Tensor
    advantage: Tensor
    policy_weight: Tensor
    """Factor of the objective: mask, normaliser and importance weight in one."""
    kl_weight: Tensor
    """Factor of the KL term: mask, normaliser and beta in one."""
    old_logps: Tensor
    """`SELF` where the old policy is the current one."""
    ref_logps: Tensor
    """`SELF` where there is no reference."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(*(function(getattr(self, field.name)) for field in fields(self)))

    def padded(self, size: int) -> Tokens:
        """Extend to `size` tokens that weigh nothing."""
        missing = size - len(self.token_ids)
        fill = {"temperature": 1.0, "old_logps": SELF, "ref_logps": SELF}
        return Tokens(
            *(
                functional.pad(getattr(self, field.name), (0, missing), value=fill.get(field.name, 0))
                for field in fields(self)
            )
        )


@dataclass(frozen=True)
class RowStatistics:
    """Softmax statistics of each row, [N] fp32."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    """Log-sum-exp of the scaled logits."""

    def map(self, function: Callable[[Tensor], Tensor]) -> RowStatistics:
        return RowStatistics(function(self.logp), function(self.entropy), function(self.lse))


@dataclass(frozen=True)
class HeadOptions:
    """How raw logits become scores: `(x @ W.T + bias) * logit_scale`, softcap, then the token's temperature.

    Made from what the user gave; the numbers become floats, since an int would compile kernels of its own.
    """

    bias: Tensor | None = None
    """[V] fp32."""
    softcap: float | None = None
    logit_scale: float = 1.0
    impl: str = "torch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", None if self.bias is None else self.bias.detach().float())
        object.__setattr__(self, "softcap", None if self.softcap is None else float(self.softcap))
        object.__setattr__(self, "logit_scale", float(self.logit_scale))


def choose_impl(impl: str | None, tensor: Tensor) -> str:
    """`impl`, or the one for the tensor's device: "triton" on CUDA, "torch" elsewhere.

    Raises ValueError for an unknown name, and for "triton" on a CPU tensor outside Triton's interpreter.
    """
    if impl is None:
        return "triton" if tensor.is_cuda else "torch"
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl {impl!r} is not one of ['torch', 'triton']")
    if impl == "triton" and tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("impl 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 before the import")
    return impl


def check_temperature(temperature: float | Tensor) -> None:
    """Raise ValueError for one that is not positive, where it can be seen without waiting for a device."""
    if isinstance(temperature, Tensor):
        least = float(temperature.min()) if temperature.device.type == "cpu" and temperature.numel() else 1.0
    else:
        least = temperature
    if not least > 0:
        raise ValueError(f"temperature must be positive, got {least}")


def per_token(
    value: float | Tensor, row_ids: Tensor | None, num_tokens: int, name: str, device: torch.device
) -> Tensor:
    """Spread a number, one value per row [B], or one per token [N], over the tokens: [N] fp32."""
    if not isinstance(value, Tensor):
        return torch.full((num_tokens,), float(value), device=device)
    value = value.to(device, torch.float32, non_blocking=True)
    if value.ndim == 0:
        return value.expand(num_tokens).contiguous()
    if value.ndim != 1:
        raise ValueError(f"{name} must be a number, [B] or [N]; got shape {tuple(value.shape)}")
    if len(value) == num_tokens:
        return value.contiguous()
    if row_ids is None:
        raise ValueError(f"{name} must hold one value per token ({num_tokens}); got {len(value)}")
    return value[row_ids]

"""What the row kernels read and write: one value per packed token, in flat fp32 vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from tempsamp_kernels.objectives import SELF

TERMS = ("logp", "entropy", "loss", "kl", "ratio", "clip_low", "clip_high")
"""Rows of the table that a loss evaluation leaves behind; `loss` is weighted, so its sum is the loss."""
NUM_TERMS = len(TERMS)
SKIP = -(2**31)
"""Token id of a row that is not read, whatever it holds: log-prob, entropy and gradient are 0."""
ALIGNMENT = 16
"""Rows of logits start at multiples of so many elements, whatever the vocabulary."""


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


Kind = TypeVar("Kind", bound="_Vectors")


@dataclass(frozen=True)
class _Vectors:
    """Fields [N] of the same tokens, some of them None."""

    def map(self: Kind, function: Callable[[Tensor], Tensor]) -> Kind:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**{name: None if value is None else function(value) for name, value in values.items()})

    def __getitem__(self: Kind, tokens: slice | Tensor) -> Kind:
        return self.map(lambda field: field[tokens])


@dataclass(frozen=True)
class Tokens(_Vectors):
    """The inputs of N tokens; every field is [N], float32 unless said otherwise."""

    token_ids: Tensor
    """int64, `SKIP` where masked."""
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
    entropy_weight: Tensor | None = None
    """Factor of the entropy bonus: mask, normaliser and coefficient in one."""
    entropy_threshold: Tensor | None = None
    """Tokens of less entropy have neither a policy term nor a bonus."""

    def padded(self, size: int) -> Tokens:
        """Extend to `size` tokens that weigh nothing."""
        room = (0, size - len(self.token_ids))
        fill = {"token_ids": SKIP, "temperature": 1.0, "old_logps": SELF, "ref_logps": SELF}
        filled = {name: functional.pad(getattr(self, name), room, value=value) for name, value in fill.items()}
        return replace(self.map(lambda field: functional.pad(field, room)), **filled)

    @classmethod
    def of_ids(cls, token_ids: Tensor, temperature: Tensor) -> Tokens:
        """Tokens of which only the log-prob is wanted."""
        return cls(token_ids, temperature, *[torch.zeros_like(temperature)] * 5)


@dataclass(frozen=True)
class RowStatistics(_Vectors):
    """Softmax statistics of each row, [N] fp32."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    """Log-sum-exp of the scaled logits."""

    def table(self) -> Tensor:
        """[3, N]."""
        return torch.stack([self.logp, self.entropy, self.lse])


@dataclass(frozen=True)
class HeadOptions:
    """How raw logits become scores: `(x @ W.T + bias) * logit_scale`, softcap, then the token's temperature.

    Made from what the user gave; the numbers become floats, since an int would compile kernels of its own.
    """

    bias: Tensor | None = None
    """[V] as given, [aligned(V)] fp32 as kept."""
    softcap: float | None = None
    logit_scale: float = 1.0
    impl: str = "torch"

    def __post_init__(self) -> None:
        if self.bias is not None:
            bias = self.bias.detach().float()
            object.__setattr__(self, "bias", functional.pad(bias, (0, aligned(len(bias)) - len(bias))))
        object.__setattr__(self, "softcap", None if self.softcap is None else float(self.softcap))
        object.__setattr__(self, "logit_scale", float(self.logit_scale))

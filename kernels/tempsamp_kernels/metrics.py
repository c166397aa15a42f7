"""Loss metrics in one device vector: nothing waits for the device until somebody reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tempsamp_kernels.tokens import TERMS

SIDES = ("", "on_policy/", "off_policy/")
MEANS = ("logp", "entropy", "kl", "clip_low", "clip_high")
OF_A_SIDE = ("num_tokens", *MEANS, "ratio_mean", "ratio_min", "ratio_max", "effective_sample_size")
NAMES = ("loss", *(side + name for side in SIDES for name in OF_A_SIDE))


@dataclass(frozen=True)
class LossMetrics:
    """What a loss call saw, detached.

    Means are over unmasked tokens: of all rows, and of on-policy and off-policy rows apart (`on_policy/kl`, ...).
    `effective_sample_size` is `sum(ratio)^2 / (n * sum(ratio^2))`, between 0 and 1.
    """

    vector: Tensor
    """[len(NAMES)] fp32 on the loss's device."""
    token_logps: Tensor
    """[N] fp32, 0 where masked."""
    token_entropies: Tensor
    """[N] fp32, 0 where masked."""

    def __getitem__(self, name: str) -> Tensor:
        """One metric, still on the device."""
        if name not in NAMES:
            raise KeyError(f"{name!r} is not one of {NAMES}")
        return self.vector[NAMES.index(name)]

    def as_dict(self) -> dict[str, float]:
        """All metrics as floats (waits for the device); a side without tokens is left out."""
        values = dict(zip(NAMES, self.vector.tolist(), strict=True))
        empty = tuple(side for side in SIDES[1:] if values[side + "num_tokens"] == 0)
        return {name: value for name, value in values.items() if not (empty and name.startswith(empty))}


def summarise(terms: Tensor, mask: Tensor, is_off_policy: Tensor) -> LossMetrics:
    """Reduce terms [NUM_TERMS, N] over the tokens of `mask` [N] bool, split by `is_off_policy` [N] bool."""
    row = {name: terms[i] for i, name in enumerate(TERMS)}
    values = [row["loss"].sum()[None]]
    for tokens in (mask, mask & ~is_off_policy, mask & is_off_policy):
        weight = tokens.float()
        count = weight.sum()
        mean = weight / count.clamp(min=1)
        read = torch.stack([*(row[name] for name in MEANS), row["ratio"], row["ratio"].square()])
        means = (read.masked_fill(~tokens, 0) * mean).sum(1)
        ratio_mean, ratio_square = means[-2], means[-1]
        is_empty = count == 0
        low = functional.pad(row["ratio"].masked_fill(~tokens, torch.inf), (0, 1), value=torch.inf).amin()
        high = functional.pad(row["ratio"].masked_fill(~tokens, 0.0), (0, 1)).amax()
        effective = ratio_mean.square() / ratio_square.clamp(min=torch.finfo(torch.float32).tiny)
        values += [count[None], means[:-1]]
        values += [torch.where(is_empty, 1.0, value)[None] for value in (low, high, effective)]
    return LossMetrics(torch.cat(values), row["logp"] * mask, row["entropy"] * mask)

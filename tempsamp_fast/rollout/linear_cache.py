"""What linear layers remember of every row while it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from tempsamp_fast.model.attention import PrefillAttention
from tempsamp_fast.model.fla_layers import fla_kernels
from tempsamp_fast.model.linear_layers import at_least_float32
from tempsamp_fast.rollout.delta_step import delta_step
from tempsamp_fast.rollout.rooms import Rooms, pick


class LinearCache:
    """A `Recurrence` of one new token per row, from the states in which the rows' prompts ended.

    Unlike keys, states cannot be shared by the rows of a prompt: each has its own. A pass changes them in place, so
    that a second one over the same tokens is not the same as one: whoever repeats a pass restores them.
    """

    def __init__(self, rooms: Rooms, prefills: Sequence[PrefillAttention], row_prompts: Sequence[int]) -> None:
        """row_prompts: the prompt that each row continues."""
        after = [prefill.recurrence.after for prefill in prefills]
        self._states: dict[int, Tensor] = {}
        """By layer: [S, heads, key_dim, value_dim], at least float32."""
        self._tails: dict[int, Tensor] = {}
        """By layer: [S, kernel - 1, channels]."""
        for layer in after[0]:
            for index, (what, kept) in enumerate((("state", self._states), ("tail", self._tails))):
                ends = torch.cat([each[layer][index] for each in after])
                shape = len(row_prompts), *ends.shape[1:]
                kept[layer] = rooms.take(f"{what} {layer}", shape, ends.dtype, ends.device)
                rows = torch.tensor(row_prompts).to(ends.device, non_blocking=True)
                kept[layer].copy_(ends.index_select(0, rows))

    def select(self, slots: Tensor) -> None:
        """[R] int64, increasing: the rows of which a token comes from now on."""
        self._slots = slots

    def convolve(self, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """inputs [R, 1, channels], weight [channels, kernel] -> [R, 1, channels]."""
        tails = self._tails[layer_index]
        window = torch.cat([pick(tails, self._slots), inputs], dim=1)
        tails.index_copy_(0, self._slots, window[:, 1:])
        wide = at_least_float32(inputs.dtype)
        return silu((window.to(wide) * weight.T.to(wide)).sum(1, keepdim=True)).to(inputs.dtype)

    def delta_rule(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        """As of `Recurrence`, N = 1."""
        query, key, value, log_decay, beta = (each[:, 0] for each in (query, key, value, log_decay, beta))
        return delta_step(self._states[layer_index], self._slots, query, key, value, log_decay, beta)[:, None]

    def gated_norm(self, norm: Any, values: Tensor, gate: Tensor) -> Tensor:
        """As of `Recurrence`."""
        kernels = fla_kernels() if values.is_cuda else None
        return kernels.gated_norm(norm, values, gate) if kernels else norm(values, gate)

    def tensors(self) -> list[Tensor]:
        """All that a pass changes."""
        return [*self._states.values(), *self._tails.values()]

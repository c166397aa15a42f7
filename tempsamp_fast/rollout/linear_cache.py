"""What linear layers remember of every row while it is decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from tempsamp_fast.model.attention import PrefillAttention
from tempsamp_fast.model.linear_layers import at_least_float32
from tempsamp_fast.rollout.delta_step import delta_step


class LinearCache:
    """A `Recurrence` of one new token per row, from the states in which the rows' prompts ended.

    Unlike keys, states cannot be shared by the rows of a prompt: each has its own. A pass changes them in place, so
    that a second one over the same tokens is not the same as one: whoever repeats a pass restores them.
    """

    def __init__(self, prefills: Sequence[PrefillAttention], row_prompts: Tensor) -> None:
        """row_prompts: [R] int64: the prompt that each row continues."""
        after = [prefill.recurrence.after for prefill in prefills]
        self._states = {layer: torch.cat([each[layer][0] for each in after])[row_prompts] for layer in after[0]}
        """By layer: [R, heads, key_dim, value_dim], at least float32."""
        self._tails = {layer: torch.cat([each[layer][1] for each in after])[row_prompts] for layer in after[0]}
        """By layer: [R, kernel - 1, channels]."""

    def convolve(self, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """inputs [R, 1, channels], weight [channels, kernel] -> [R, 1, channels]."""
        tail = self._tails[layer_index]
        window = torch.cat([tail, inputs], dim=1)
        tail.copy_(window[:, 1:])
        wide = at_least_float32(inputs.dtype)
        return silu((window.to(wide) * weight.T.to(wide)).sum(1, keepdim=True)).to(inputs.dtype)

    def delta_rule(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        """As of `Recurrence`, N = 1."""
        query, key, value, log_decay, beta = (each[:, 0] for each in (query, key, value, log_decay, beta))
        return delta_step(self._states[layer_index], query, key, value, log_decay, beta)[:, None]

    def retire(self, keep: Tensor) -> None:
        """Keep only these rows: [R] int64."""
        self._states = {layer: state[keep] for layer, state in self._states.items()}
        self._tails = {layer: tail[keep] for layer, tail in self._tails.items()}

    def saved(self) -> list[Tensor]:
        """A copy of all that a pass changes."""
        return [tensor.clone() for tensor in self._tensors()]

    def restore(self, saved: Sequence[Tensor]) -> None:
        """Write what `saved` gave back into the same tensors."""
        for tensor, was in zip(self._tensors(), saved, strict=True):
            tensor.copy_(was)

    def _tensors(self) -> list[Tensor]:
        return [*self._states.values(), *self._tails.values()]

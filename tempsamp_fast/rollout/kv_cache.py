"""Keys and values for decoding: what rows share once for all of them, and each row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempsamp_fast.model.attention import PrefillAttention
from tempsamp_fast.rollout.linear_cache import LinearCache
from tempsamp_fast.rollout.shared_keys import attend, shared_levels

OWN_TOKENS = 64
"""Room for so many tokens of a row's own at first; it doubles when it is full."""


class SharedPrefixCache:
    """Attention of one new token per row to its prompt and to the row's earlier tokens.

    The parts are computed apart and merged by their log-sum-exps, so that a prompt's keys are stored and read once
    however many rows continue it, and those of a video once however many prompts ask about it.

    A pass reads and writes the same tensors as the one before it, of the same shapes, until `version` changes: what a
    CUDA graph needs. `advance` comes before every pass.
    """

    def __init__(self, prefills: Sequence[PrefillAttention], row_prompts: Tensor) -> None:
        """row_prompts: [R] int64, increasing: the prompt that each row continues."""
        layers, device = list(prefills[0].keys), row_prompts.device
        self._shared = shared_levels(prefills, row_prompts)
        self.recurrence = LinearCache(prefills, row_prompts)
        like = prefills[0].keys[layers[0]]
        room = [len(row_prompts), like.shape[1], OWN_TOKENS, like.shape[3]]
        self._own_keys = {layer: like.new_zeros(room) for layer in layers}
        self._own_values = {layer: like.new_zeros(room) for layer in layers}
        self._own_bias = torch.full((OWN_TOKENS,), float("-inf"), device=device)
        self._newest = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_own = 0
        self.version = 0
        """Counts how often the rows or their room have changed."""

    def advance(self) -> None:
        """Make room for one more token of every row."""
        if self._num_own == len(self._own_bias):
            self._own_keys = {i: _doubled(keys, 2, 0.0) for i, keys in self._own_keys.items()}
            self._own_values = {i: _doubled(values, 2, 0.0) for i, values in self._own_values.items()}
            self._own_bias = _doubled(self._own_bias, 0, float("-inf"))
            self.version += 1
        self._own_bias[self._num_own].fill_(0.0)  # an assignment would wait for the device
        self._newest.fill_(self._num_own)
        self._num_own += 1

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [R, heads, 1, dim], key and value [R, kv_heads, 1, dim] -> [R, 1, heads, dim]."""
        own_keys = self._own_keys[layer_index].index_copy_(2, self._newest, key)
        own_values = self._own_values[layer_index].index_copy_(2, self._newest, value)
        query = query[:, :, 0].unflatten(1, (key.shape[1], -1))
        output, lse = attend(query, own_keys, own_values, self._own_bias, scaling)
        for level, shared in enumerate(self._shared, start=1):
            theirs, their_lse = shared.attend(layer_index, query, scaling)
            share = torch.sigmoid(their_lse - lse)[..., None]
            output = torch.lerp(output, theirs, share)
            if level < len(self._shared):
                lse = torch.logaddexp(lse, their_lse)
        return output.flatten(1, 2)[:, None].to(value.dtype)

    def retire(self, keep: Tensor) -> None:
        """Keep only these rows ([R] int64, increasing) and the prompts that they continue."""
        self._own_keys = {i: keys[keep] for i, keys in self._own_keys.items()}
        self._own_values = {i: values[keep] for i, values in self._own_values.items()}
        self.recurrence.retire(keep)
        for shared in self._shared:
            shared.retire(keep)
        self.version += 1


def _doubled(tensor: Tensor, dim: int, value: float) -> Tensor:
    """Twice as long in one dimension, the new half filled with `value`."""
    return torch.cat([tensor, torch.full_like(tensor, value)], dim=dim)

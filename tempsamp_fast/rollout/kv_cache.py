"""Keys and values for decoding: each prompt's once, shared by all of its rows, and each row's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tempsamp_fast.model.attention import PrefillAttention
from tempsamp_fast.rollout.linear_cache import LinearCache

OWN_TOKENS = 64
"""Room for so many tokens of a row's own at first; it doubles when it is full."""


class SharedPrefixCache:
    """Attention of one new token per row to its prompt and to the row's earlier tokens.

    The two parts are computed apart and merged by their log-sum-exps, so that a prompt's keys are stored and read
    once however many rows continue it. Prompts are padded to the longest.

    A pass reads and writes the same tensors as the one before it, of the same shapes, until `version` changes: what a
    CUDA graph needs. `advance` comes before every pass.
    """

    def __init__(self, prefills: Sequence[PrefillAttention], row_prompts: Tensor) -> None:
        """row_prompts: [R] int64, increasing: the prompt that each row continues."""
        layers, device = list(prefills[0].keys), row_prompts.device
        self._prefix_keys = {i: _pad([k for p in prefills for k in p.by_prompt(p.keys[i])]) for i in layers}
        self._prefix_values = {i: _pad([v for p in prefills for v in p.by_prompt(p.values[i])]) for i in layers}
        self.recurrence = LinearCache(prefills, row_prompts)
        keys_shape = prefills[0].keys[layers[0]].shape
        lengths = torch.tensor([length for p in prefills for length in p.prompt_lens], device=device)
        is_padding = torch.arange(int(lengths.max()), device=device) >= lengths[:, None]
        self._prefix_bias = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill(is_padding, float("-inf"))
        self._row_prompts = row_prompts
        room = [len(row_prompts), keys_shape[1], OWN_TOKENS, keys_shape[3]]
        self._own_keys = {i: keys.new_zeros(room) for i, keys in self._prefix_keys.items()}
        self._own_values = {i: values.new_zeros(room) for i, values in self._prefix_values.items()}
        self._own_bias = torch.full((OWN_TOKENS,), float("-inf"), device=device)
        self._newest = torch.zeros(1, dtype=torch.int64, device=device)
        self._num_own = 0
        self.version = 0
        """Counts how often the rows or their room have changed."""
        self._assign_slots()

    def advance(self) -> None:
        """Make room for one more token of every row."""
        if self._num_own == len(self._own_bias):
            self._own_keys = {i: _doubled(keys, 2, 0.0) for i, keys in self._own_keys.items()}
            self._own_values = {i: _doubled(values, 2, 0.0) for i, values in self._own_values.items()}
            self._own_bias = _doubled(self._own_bias, 0, float("-inf"))
            self.version += 1
        self._own_bias[self._num_own] = 0.0
        self._newest.fill_(self._num_own)
        self._num_own += 1

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [R, heads, 1, dim], key and value [R, kv_heads, 1, dim] -> [R, 1, heads, dim]."""
        own_keys = self._own_keys[layer_index].index_copy_(2, self._newest, key)
        own_values = self._own_values[layer_index].index_copy_(2, self._newest, value)
        query = (query * scaling)[:, :, 0].unflatten(1, (key.shape[1], -1))
        own, own_lse = _attend(query, own_keys, own_values, self._own_bias)
        prefix, prefix_lse = self._attend_prefix(layer_index, query)
        prefix_share = torch.sigmoid(prefix_lse - own_lse)[..., None].to(own.dtype)
        return torch.lerp(own, prefix, prefix_share).flatten(1, 2)[:, None]

    def retire(self, keep: Tensor) -> None:
        """Keep only these rows ([R] int64, increasing) and the prompts they continue."""
        self._own_keys = {i: keys[keep] for i, keys in self._own_keys.items()}
        self._own_values = {i: values[keep] for i, values in self._own_values.items()}
        self.recurrence.retire(keep)
        prompts, self._row_prompts = self._row_prompts[keep].unique(return_inverse=True)
        if len(prompts) < len(self._prefix_bias):
            self._prefix_keys = {i: keys[prompts] for i, keys in self._prefix_keys.items()}
            self._prefix_values = {i: values[prompts] for i, values in self._prefix_values.items()}
            self._prefix_bias = self._prefix_bias[prompts]
        self.version += 1
        self._assign_slots()

    def _assign_slots(self) -> None:
        """Give the rows of a prompt places 0, 1, ..., so that their queries stack into one matrix per prompt."""
        counts = torch.bincount(self._row_prompts, minlength=len(self._prefix_bias))
        first = counts.cumsum(0) - counts
        place = torch.arange(len(self._row_prompts), device=counts.device) - first[self._row_prompts]
        self._num_slots = int(counts.max())
        self._slots = self._row_prompts * self._num_slots + place

    def _attend_prefix(self, layer_index: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """query [R, kv_heads, heads_per_kv, dim] -> the same shape, and log-sum-exps without the last axis."""
        num_prompts, heads_per_kv = len(self._prefix_bias), query.shape[2]
        stacked = query.new_zeros(num_prompts * self._num_slots, *query.shape[1:])
        stacked[self._slots] = query
        stacked = stacked.unflatten(0, (num_prompts, -1)).transpose(1, 2).flatten(2, 3)
        keys, values = self._prefix_keys[layer_index], self._prefix_values[layer_index]
        output, lse = _attend(stacked, keys, values, self._prefix_bias[:, None, None])
        unstack = lambda tensor: tensor.unflatten(2, (-1, heads_per_kv)).transpose(1, 2).flatten(0, 1)[self._slots]
        return unstack(output), unstack(lse)


def _attend(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled queries [B, heads, Q, dim] on [B, heads, K, dim] -> outputs, and float32 log-sum-exps [B, heads, Q]."""
    scores = (query @ keys.transpose(-1, -2)).float() + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(values.dtype) @ values, lse


def _pad(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [length, heads, dim] -> [N, heads, longest, dim], zeros after each."""
    return pad_sequence(list(tensors), batch_first=True).transpose(1, 2).contiguous()


def _doubled(tensor: Tensor, dim: int, value: float) -> Tensor:
    """Twice as long in one dimension, the new half filled with `value`."""
    return torch.cat([tensor, torch.full_like(tensor, value)], dim=dim)

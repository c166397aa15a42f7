"""Keys and values for decoding: what rows share once for all of them, and each row's own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tempsamp_fast.model.attention import PrefillAttention
from tempsamp_fast.rollout.decode_attention import DecodedRows, LayerKeys, decode_attention
from tempsamp_fast.rollout.linear_cache import LinearCache
from tempsamp_fast.rollout.rooms import Rooms, rounded_up
from tempsamp_fast.rollout.spans import cut, rows_per_item

OWN_TOKENS = 64
"""Room for so many tokens of a row's own at first; it doubles when it is full."""


class DecodeCache:
    """Attention of one new token per row to its prompt and to the row's earlier tokens.

    A prompt's keys are stored and read once however many rows continue it, and those of a video once however many
    prompts ask about it. `take` stores what was prefilled, `select` says which rows are decoded, `make_room` comes
    before every pass. A pass reads and writes the same tensors as the one before it, of the same shapes, until other
    rows are selected or `rooms.version` changes: what a CUDA graph needs.
    """

    def __init__(self, rooms: Rooms, num_tokens: int) -> None:
        """num_tokens: of all prompts."""
        self._rooms = rooms
        self._num_tokens, self._num_stored = num_tokens, 0
        self._paths: list[tuple[tuple[int, int], ...]] = []
        """By prompt: (first key, number of keys) of what it is made of, from the video on."""
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers: dict[int, LayerKeys] = {}
        self._ends: list[PrefillAttention] = []

    def take(self, prefill: PrefillAttention) -> None:
        """Store keys and values of a row of prompts, and how its linear layers ended."""
        starts = accumulate((tree.num_tokens for tree in prefill.layout), initial=self._num_stored)
        for start, tree in zip(starts, prefill.layout, strict=False):
            spans = [(start + node.start, node.length) for node in tree.nodes]
            leaves = [(node, span) for node, span in zip(tree.nodes, spans, strict=True) if node.is_leaf]
            self._paths += [(*(spans[each] for each in node.path), span) for node, span in leaves]
        stop = self._num_stored + sum(tree.num_tokens for tree in prefill.layout)
        for layer, key in prefill.keys.items():
            shape = rounded_up(self._num_tokens), key.shape[1], key.shape[3]
            keys, values = (
                self._rooms.take(f"{what} {layer}", shape, key.dtype, key.device) for what in ("keys", "values")
            )
            keys[self._num_stored : stop] = key[0].transpose(0, 1)
            values[self._num_stored : stop] = prefill.values[layer][0].transpose(0, 1)
            self._keys[layer] = keys, values
        self._num_stored = stop
        prefill.keys.clear()
        prefill.values.clear()
        self._ends.append(prefill)

    def begin(self, row_prompts: Sequence[int], num_heads: int) -> None:
        """Rows, of which none has a token of its own yet, and the prompt that each continues: increasing."""
        keys, _ = next(iter(self._keys.values()))
        self._device, self._row_prompts, self._num_heads = keys.device, row_prompts, num_heads
        self._num_kv_heads, self._head_dim = keys.shape[1:]
        for layer, (shared_keys, shared_values) in self._keys.items():
            own = self._own_room(layer, OWN_TOKENS)
            self._layers[layer] = LayerKeys(shared_keys, shared_values, *own)
        self.step = self._rooms.take("step", (1,), torch.int64, self._device).zero_()
        """[1]: how many tokens of their own rows have stored, before the pass that stores one more."""
        self.recurrence = LinearCache(self._rooms, self._ends, row_prompts)
        self._ends.clear()
        self._order = self._rooms.take("order", (len(row_prompts),), torch.int64, self._device)
        self._order.copy_(torch.arange(len(row_prompts)), non_blocking=True)
        self.select(range(len(row_prompts)))

    def select(self, slots: Sequence[int]) -> None:
        """Decode these of the rows, increasing, from now on."""
        spans, num_parts = cut([self._paths[self._row_prompts[slot]] for slot in slots], self._num_kv_heads)
        most = rows_per_item(self._num_heads, self._num_kv_heads)
        items = [item for span in spans for item in span.items(most)]
        part_shape = len(self._row_prompts), rounded_up(max(num_parts)), self._num_heads
        take = lambda name, shape, dtype: self._rooms.take(name, shape, dtype, self._device)
        for name, content in (("slots", slots), ("items", items), ("parts", num_parts)):
            values = torch.tensor(content, dtype=torch.int64 if name == "slots" else torch.int32)
            name = f"{name} of {len(slots)} rows"
            take(name, (rounded_up(len(values)), *values.shape[1:]) if values.ndim > 1 else values.shape, values.dtype)
            self._rooms.whole(name).zero_()[: len(values)].copy_(values, non_blocking=True)
        self.rows = DecodedRows(
            slots=self._rooms.whole(f"slots of {len(slots)} rows"),
            step=self.step,
            spans=spans,
            items=self._rooms.whole(f"items of {len(slots)} rows"),
            num_parts=self._rooms.whole(f"parts of {len(slots)} rows"),
            parts=take("parts", (*part_shape, self._head_dim), torch.float32),
            lses=take("log-sum-exps", part_shape, torch.float32),
        )
        self.order = self._order[: len(slots)]
        """[R] int64: 0, 1, ..."""
        self.recurrence.select(self.rows.slots)

    def make_room(self, num_own: int) -> None:
        """For one more token of every row, of which each has `num_own`."""
        for layer, keys in self._layers.items():
            if num_own == keys.own_keys.shape[1]:
                for what in ("own keys", "own values"):
                    self._rooms.double(f"{what} {layer}", 1)
                self._layers[layer] = LayerKeys(keys.keys, keys.values, *self._own_room(layer, 2 * num_own))

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query [R, heads, 1, dim], key and value [R, kv_heads, 1, dim] -> [R, 1, heads, dim]."""
        query, key, value = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        return decode_attention(query, key, value, self._layers[layer_index], self.rows, scaling)[:, None]

    def _own_room(self, layer: int, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Of the rows, for so many tokens, or as many more as an earlier rollout needed."""
        shape = len(self._row_prompts), num_tokens, self._num_kv_heads, self._head_dim
        for what in ("keys", "values"):
            self._rooms.take(f"own {what} {layer}", shape, self._keys[layer][0].dtype, self._device)
        keys, values = (self._rooms.whole(f"own {what} {layer}")[: shape[0]] for what in ("keys", "values"))
        return keys, values

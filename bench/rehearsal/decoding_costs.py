"""What attention of decoded tokens costs, by the keys that its tables name: most of its tensors is room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.rehearsal.card import known
from bench.rehearsal.costs import num_bytes
from bench.rehearsal.ledger import Work

OWN_KEYS = 64
"""Of every row: half an answer of 128 tokens."""


def shared_keys(arguments: dict[str, Any]) -> Work:
    """Keys and values once per item; of every query that reads them the sum and the log-sum-exp."""
    items = known(arguments["items"])
    assert items is not None
    rows, keys = items[:, 1].double(), items[:, 3].double()
    head_dim, num_heads = arguments["head_dim"], arguments["num_kv_heads"] * arguments["heads_per_kv"]
    read = 2.0 * float(keys.sum()) * arguments["num_kv_heads"] * head_dim * arguments["keys"].element_size()
    written = 4.0 * float(rows.sum()) * num_heads * (head_dim + 1)
    flops = 4.0 * float((rows * keys).sum()) * num_heads * head_dim
    return Work(1, flops, read + written + num_bytes(arguments["query"]), "flash")


def own_keys(arguments: dict[str, Any]) -> Work:
    """Own keys and values, what `shared_keys` wrote, and the output."""
    num_parts = known(arguments["num_parts"])
    assert num_parts is not None
    head_dim, num_kv_heads = arguments["head_dim"], arguments["num_kv_heads"]
    num_rows, num_heads = len(num_parts), num_kv_heads * arguments["heads_per_kv"]
    moved = 2.0 * num_rows * (OWN_KEYS + 2) * num_kv_heads * head_dim * arguments["own_keys"].element_size()
    moved += 4.0 * float(num_parts.sum()) * num_heads * (head_dim + 1) + 2 * num_bytes(arguments["query"])
    return Work(1, 4.0 * num_rows * (OWN_KEYS + 1) * num_heads * head_dim, moved, "flash")


DECODING: dict[str, Callable[[dict[str, Any]], Work]] = {
    "shared_keys_kernel": shared_keys,
    "own_keys_kernel": own_keys,
}
"""By kernel."""

"""What an operation costs on a card, by its shapes: launches, FLOPs and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.rehearsal.ledger import Work

LAUNCHES = {
    "logsumexp": 9, "isin": 4, "masked_scatter": 4, "_unique2": 12, "bincount": 5, "nonzero": 4, "sort": 6, "topk": 4,
    "argsort": 6, "cumsum": 2, "embedding_dense_backward": 8, "_flash_attention_backward": 4, "_varlen_attn": 2,
    "_varlen_attn_backward": 6, "scatter": 2, "masked_select": 6, "unique_dim": 12, "convolution": 2,
    "convolution_backward": 4, "isfinite": 3, "_foreach_norm": 4, "unique_consecutive": 8, "searchsorted": 1,
}  # fmt: skip
"""Kernels of operations that are several on CUDA, by the names in ATen's sources; all others count as one."""
SORTED_GATHER_BACKWARD = 10
"""Kernels of an `index_put_` that adds up: it sorts the indices."""
FREE = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "detach_", "alias",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "resize_", "set_", "lift", "is_same_size", "record_stream",
    "device", "sym_size",
}  # fmt: skip
"""No kernel runs."""
FILLS = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "ones", "ones_like", "fill_", "zero_", "new_full",
         "new_ones", "arange", "scalar_tensor", "randn", "rand", "randint", "normal_", "uniform_", "eye"}  # fmt: skip
GATHERS = {"index", "index_select", "embedding", "gather", "_unsafe_index"}
SCATTERS = {"index_put_", "_index_put_impl_", "index_copy_", "scatter_", "index_add_", "index_fill_"}
READS = {"logsumexp": 6.0, "sort": 8.0, "argsort": 8.0, "topk": 4.0}
"""How often the input is read or written on the way."""

Lengths = Callable[[Tensor], Tensor | None]
"""The true values of a tensor on the pretended card, where they are known."""


def num_bytes(tensor: Tensor) -> int:
    """That reading all of it moves: what is expanded counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def attended_pairs(arguments: Sequence[Any], is_causal: bool, known: Lengths) -> float:
    """Of `(query, key, ..., cu_q, cu_k, max_q, max_k)`: pairs of a token and a token it sees."""
    query, key, cu_q, cu_k, _, max_k = arguments
    starts = known(cu_q), known(cu_k)
    if starts[0] is None or starts[1] is None:
        return float(len(query) * min(max_k, len(key)))
    q, k = (each.diff().double() for each in starts)
    return float((q * k - (q * (q - 1) / 2 if is_causal else 0)).sum())


def product(a: Tensor, b: Tensor) -> tuple[float, str]:
    """FLOPs of a @ b and whose rate they run at."""
    return 2.0 * a.numel() * b.shape[-1], "fp32" if a.dtype == torch.float32 else ""


def work_of(name: str, args: Sequence[Any], kwargs: dict[str, Any], out: list[Tensor], known: Lengths) -> Work:
    """The work of ATen's (or torch_attn's) operation `name`, without namespace and overload, on tensors of a card."""
    tensors = [each for each in _flat([*args, *kwargs.values()]) if isinstance(each, Tensor)]
    inputs = [each for each in tensors if each.device.type == "cuda"]
    launches = LAUNCHES.get(name, 1)
    flops, kind, moved = 0.0, "", float(sum(map(num_bytes, inputs)) + sum(map(num_bytes, out)))
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        a, b = [each for each in args if isinstance(each, Tensor)][1 if name in ("addmm", "baddbmm") else 0 :][:2]
        flops, kind = product(a, b)
    elif name == "convolution":
        flops = 2.0 * out[0].numel() * args[1][0].numel()
    elif name == "convolution_backward":
        flops = 2.0 * args[0].numel() * args[2][0].numel() * max(1, len(out) - 1)
    elif name == "_varlen_attn":
        query, key, _, cu_q, cu_k, max_q, max_k, is_causal = args[:8]
        pairs = attended_pairs((query, key, cu_q, cu_k, max_q, max_k), is_causal, known)
        flops, kind = 4.0 * query.shape[1] * query.shape[2] * pairs, "flash"
    elif name == "_varlen_attn_backward":
        _, query, key, _, _, _, cu_q, cu_k, max_q, max_k, is_causal = args[:11]
        pairs = attended_pairs((query, key, cu_q, cu_k, max_q, max_k), is_causal, known)
        flops, kind = 10.0 * query.shape[1] * query.shape[2] * pairs, "flash_bwd"
    elif name.startswith("_scaled_dot_product"):
        is_backward = name.endswith("_backward")
        query, key = args[1:3] if is_backward else args[:2]
        flops = (10.0 if is_backward else 4.0) * query.numel() * key.shape[2]
        flops /= 2 if any(each is True for each in args) else 1
        kind = "flash_bwd" if is_backward else "flash"
    elif name in GATHERS:
        indices = sum(num_bytes(each) for each in inputs if not each.is_floating_point())
        moved = 2.0 * sum(map(num_bytes, out)) + indices
    elif name in SCATTERS:
        adds = name in ("index_put_", "_index_put_impl_") and len(args) > 3 and args[3]
        launches = SORTED_GATHER_BACKWARD if adds else launches
        moved = 2.0 * min(num_bytes(inputs[-1]), num_bytes(inputs[0])) * (2 if adds else 1)
    elif name in FILLS:
        moved = float(sum(map(num_bytes, out)) or num_bytes(inputs[0]))
    elif name in READS:
        moved = READS[name] * num_bytes(inputs[0])
    elif name == "copy_":
        moved = float(sum(map(num_bytes, inputs)))
    if name.startswith(("_foreach", "_fused")):
        launches = -(-len(inputs) // 100) * LAUNCHES.get(name, 1)
    return Work(launches, flops, moved, kind)


def _flat(values: Sequence[Any]) -> list[Any]:
    """Lists of tensors inside taken apart."""
    return [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]

"""Packed attention as one variable-length flash call: flash-attn's kernel when installed, else torch's own."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from transformers.utils import is_flash_attn_2_available

from tempsamp_fast.model.fla_layers import packed_recurrence
from tempsamp_fast.model.layout import GroupLayout

logger = logging.getLogger(__name__)

FLASH_DTYPES = (torch.float16, torch.bfloat16)


VarlenKernel = Callable[..., Tensor]
"""Attention inside each of S sequences laid end to end; causal is aligned to the bottom right.

`(query [Tq, heads, dim], key and value [Tk, kv_heads, dim], cu_q, cu_k [S + 1] int32, max_q, max_k, *, scale, causal)
-> [Tq, heads, dim]`, where `cu_*` say in which tokens sequences begin and end, `max_*` how long the longest one is."""


@cache
def varlen_kernel() -> VarlenKernel | None:
    """The kernel of this installation; None, logged once, when there is none."""
    if is_flash_attn_2_available():
        from flash_attn import flash_attn_varlen_func

        return adapt_flash_attn(flash_attn_varlen_func)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        logger.warning("no variable-length attention kernel (%s): attention runs as several SDPA calls", error)
        return None
    return adapt_torch_varlen(varlen_attn)


def adapt_flash_attn(flash_attn_varlen_func: Callable[..., Any]) -> VarlenKernel:
    """flash-attn 2.1 or newer: grouped heads and bottom-right causal are its own."""

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, causal):
        return flash_attn_varlen_func(query, key, value, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal)

    return kernel


def adapt_torch_varlen(varlen_attn: Callable[..., Any]) -> VarlenKernel:
    """torch's `varlen_attn`, whose keywords differ between releases: causal by flag or by window, grouped or not.

    A release without a keyword for grouped heads may take them all the same: a trial says so, once per device and
    dtype.
    """
    parameters = inspect.signature(varlen_attn).parameters
    by_window, has_gqa = "window_size" in parameters, "enable_gqa" in parameters

    def call(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, causal):
        options = {"window_size": (-1, 0 if causal else -1)} if by_window else {"is_causal": causal}
        if has_gqa:
            options["enable_gqa"] = query.shape[1] != key.shape[1]
        return varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, **options)

    groups_right = cache(lambda device, dtype: has_gqa or groups_heads(call, device, dtype))

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, causal):
        if query.shape[1] != key.shape[1] and not groups_right(query.device, query.dtype):
            key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for t in (key, value))
        return call(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale, causal=causal)

    return kernel


def groups_heads(kernel: VarlenKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether grouped heads give what repeated ones do, gradients included; where not, it is logged.

    Its own saved tensors are hidden from a layer that is being recorded for recomputation.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (48, 4, 64), (48, 2, 64), (48, 2, 64)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    cu = _cumulative([16, 32], device)

    def results(repeats: int) -> list[Tensor]:
        query, *keys_values = inputs
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in keys_values)
        output = kernel(query, key, value, cu, cu, 32, 32, scale=0.125, causal=True)
        return [output, *torch.autograd.grad(output.float().square().sum(), inputs)]

    with torch.enable_grad(), saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        expected = results(2)
        try:
            actual = results(1)
        except (AssertionError, RuntimeError, ValueError) as error:
            logger.warning("grouped heads are repeated: the kernel refuses them (%s)", str(error).splitlines()[:1])
            return False
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(actual, expected, strict=True)]
    distance = float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())
    if not distance <= 0.05:
        logger.warning("grouped heads are repeated: the kernel's results of them are off by %.2g", distance)
        return False
    return True


class VarlenAttention:
    """A `PackedAttention`: every node a sequence whose keys are those on its path and its own."""

    def __init__(self, layout: Sequence[GroupLayout], *, device: torch.device, kernel: VarlenKernel) -> None:
        self._kernel = kernel
        self.recurrence = packed_recurrence(layout, device)
        query_lens, key_ranges = _sequences(layout)
        key_lens = [sum(stop - start for start, stop in ranges) for ranges in key_ranges]
        self._cu_q, self._max_q = _cumulative(query_lens, device), max(query_lens)
        self._cu_k, self._max_k = _cumulative(key_lens, device), max(key_lens)
        self._keys = torch.cat([torch.arange(*bounds, device=device) for ranges in key_ranges for bounds in ranges])

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        key, value = _Gathered.apply(key, self._keys), _Gathered.apply(value, self._keys)
        bounds = self._cu_q, self._cu_k, self._max_q, self._max_k
        return self._kernel(query.contiguous(), key, value, *bounds, scale=scaling, causal=True)[None]


class _Gathered(torch.autograd.Function):
    """`tensor[index]` along the first axis; the gradients of what is taken often are summed in float32, unsorted."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length = len(tensor)
        return tensor.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.zeros(ctx.length, *gradient.shape[1:], device=gradient.device, dtype=wide)
        return total.index_add_(0, index, gradient.to(wide)).to(gradient.dtype), None


def _sequences(layout: Sequence[GroupLayout]) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Query length of each sequence, and the token ranges that its keys come from."""
    query_lens, key_ranges, start = [], [], 0
    for group in layout:
        spans = [(start + node.start, start + node.start + node.length) for node in group.nodes]
        query_lens += [node.length for node in group.nodes]
        key_ranges += [
            [*(spans[each] for each in node.path), span] for node, span in zip(group.nodes, spans, strict=True)
        ]
        start += group.num_tokens
    return query_lens, key_ranges


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)

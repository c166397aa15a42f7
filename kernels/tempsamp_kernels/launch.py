"""Which implementation runs, and how a Triton kernel is started."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

IMPLS = ("torch", "triton")


def choose_impl(impl: str | None, tensor: Tensor) -> str:
    """`impl`, or the one for the tensor's device: "triton" on CUDA, "torch" elsewhere.

    Raises ValueError for an unknown name, and for "triton" on a CPU tensor outside Triton's interpreter.
    """
    if impl is None:
        return "triton" if tensor.is_cuda else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {IMPLS}")
    if impl == "triton" and tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("impl 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 before the import")
    return impl


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a kernel on the device of its tensors, whichever is the current one; nothing at all for an empty grid.

    Kernels index vectors by position alone, so every [N] input is made contiguous here.
    """
    if 0 in grid:
        return
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.ndim == 1:
            arguments[name] = value.contiguous()
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)

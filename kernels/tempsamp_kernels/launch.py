"""Which implementation runs, and how a Triton kernel is started."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tempsamp_kernels.optional_triton import MISSING, has_triton, triton

IMPLS = ("torch", "triton")


def choose_impl(impl: str | None, tensor: Tensor) -> str:
    """`impl`, or the one for the tensor's device: "triton" on CUDA, "torch" elsewhere.

    Where Triton is not installed, CUDA tensors get "torch" with a warning. Raises ValueError for an unknown name, for
    "triton" without Triton, and on a CPU tensor outside its interpreter.
    """
    if impl is None:
        if tensor.is_cuda and not has_triton:
            warnings.warn(MISSING, stacklevel=3)
        return "triton" if tensor.is_cuda and has_triton else "torch"
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not one of {IMPLS}")
    if impl == "triton" and not has_triton:
        raise ValueError(MISSING)
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

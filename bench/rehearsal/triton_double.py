"""Triton without a card: every launch compiles its kernel for sm_90, with the types of the call, and stops there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bench.rehearsal.card import on_card
from bench.rehearsal.costs import num_bytes
from bench.rehearsal.decoding_costs import DECODING
from bench.rehearsal.ledger import LEDGER, Work

MOST_BLOCKS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
SECOND_READ = {"row_loss_kernel", "draw_kernel"}
"""Kernels that read their largest input twice: statistics first, then the gradient."""
WRITTEN_OVER = {"_triton_rope": 1.0, "_swiglu_backward_kernel": 2 / 3, "tower_rotation_kernel": 1 / 3}
"""Kernels that work in place: what they move on top, as a share of their tensors' bytes."""


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {}


class _Address:
    """What Triton looks at of a tensor: its dtype, and whether its address is aligned (memory starts at 512 bytes)."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


@dataclass
class Compiled:
    """A kernel as it was compiled for one signature."""

    name: str
    kernel: Any

    def resources(self) -> dict[str, int]:
        """Registers, and bytes of spilled registers and of shared memory."""
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        spilled = found["STACK"] + found["LOCAL"]
        return {"registers": found["REG"], "spilled": spilled, "shared": self.kernel.metadata.shared}


COMPILED: dict[Any, Compiled] = {}
_compile = JITFunction.run


def pretend() -> None:
    """Put the double into Triton."""
    driver.set_active(_Driver())
    JITFunction.run = _run
    Autotuner._bench = lambda self, *args, config, **meta: 0.0  # nothing can be timed: the first schedule is taken


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    if not all(map(on_card, tensors)):
        raise ValueError(f"{self.__name__}: a pointer to memory of the host cannot be read by Triton")
    address = lambda each: _Address(each) if isinstance(each, FakeTensor) else each
    options = {name: address(value) for name, value in kwargs.items()}
    kernel = _compile(self, *map(address, args), grid=grid, warmup=True, **options)
    COMPILED.setdefault((self.__name__, kernel.hash), Compiled(self.__name__, kernel))
    if isinstance(grid, tuple) and any(size > most for size, most in zip(grid, MOST_BLOCKS, strict=False)):
        raise RuntimeError(f"{self.__name__}: a grid of {grid} is more than the card takes")
    LEDGER.launch(f"triton {self.__name__}", _work(self.__name__, tensors, kwargs))
    return kernel


def _work(name: str, tensors: list[Tensor], arguments: dict[str, Any]) -> Work:
    """By default every tensor is read or written once."""
    if name in DECODING:
        return DECODING[name](arguments)
    moved = sum(map(num_bytes, tensors)) * (1 + WRITTEN_OVER.get(name, 0.0))
    if name in SECOND_READ:
        moved += max(map(num_bytes, tensors))
    return Work(1, 0.0, moved)

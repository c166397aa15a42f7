"""The stage of a rehearsal: doubles of CUDA and Triton in their places."""

from __future__ import annotations

import builtins
from typing import Any

import tempsamp_kernels.inputs
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bench.rehearsal import cuda_double, triton_double


def set_up() -> None:
    """Before anything of the project is played. Raises SystemExit without torch's CUDA build."""
    if not torch.backends.cuda.is_built():
        raise SystemExit("the rehearsal needs the CUDA build of torch: make rehearse sets it up")
    cuda_double.pretend()
    triton_double.pretend()

    def type_of(value: Any) -> Any:
        """The kernels tell sharded weights by their type; a fake one is as plain as any."""
        return Tensor if isinstance(value, FakeTensor) else builtins.type(value)

    tempsamp_kernels.inputs.type = type_of  # type: ignore[attr-defined]

"""Triton where it is installed; where it is not, what lets the modules be imported and `impl="torch"` work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

MISSING = "impl 'triton' needs the package triton (Linux: pip install triton); impl='torch' does without it"


class _NoTriton:
    """Decorates kernels, which then can only be looked at."""

    def jit(self, function: Any = None, **_: Any) -> Any:
        return function or (lambda kernel: kernel)

    def constexpr(self, value: Any) -> Any:
        return SimpleNamespace(value=value)


triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    triton = tl = _NoTriton()

has_triton = not isinstance(triton, _NoTriton)

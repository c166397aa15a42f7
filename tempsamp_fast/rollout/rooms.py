"""Tensors that are kept from one rollout to the next, so that a recorded pass finds them where they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Rooms:
    """Tensors by name, made where they are missing or too small and never given back.

    A tensor that was taken holds zeros, or whatever an earlier rollout left there.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.version = 0
        """Counts how often a tensor was made anew: what was recorded before then reads others."""

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of this shape of the tensor kept as `name`, whose strides stay while it does not grow."""
        kept, room = self._kept.get(name), tuple(shape)
        if kept is not None and (kept.dtype, kept.device, kept.ndim) == (dtype, device, len(room)):
            room = tuple(max(pair) for pair in zip(kept.shape, shape, strict=True))
        if kept is None or (kept.dtype, kept.device, kept.shape) != (dtype, device, room):
            self.version += kept is not None
            kept = None
            self._kept[name] = torch.zeros(0)  # gives the memory of the last one back first
            self._kept[name] = torch.zeros(room, dtype=dtype, device=device)
        return self._kept[name][tuple(slice(size) for size in shape)]

    def whole(self, name: str) -> Tensor:
        """All of what is kept as `name`."""
        return self._kept[name]

    def double(self, name: str, dim: int) -> None:
        """Twice the room in one dimension, what is there kept."""
        kept = self._kept[name]
        self._kept[name] = torch.cat([kept, torch.zeros_like(kept)], dim=dim)
        self.version += 1


def rounded_up(size: int) -> int:
    """The next size of few: at most an eighth more, so that sizes which differ little take the same room."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def pick(tensor: Tensor, slots: Tensor) -> Tensor:
    """`tensor[slots]` for increasing slots: the tensor itself where they are all of it."""
    return tensor if len(slots) == len(tensor) else tensor.index_select(0, slots)

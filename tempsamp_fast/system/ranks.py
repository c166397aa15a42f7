"""What ranks tell each other; in a single process, whatever it knows itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def num_ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_rank() -> bool:
    """Whether this is rank 0, or the only process."""
    return own_rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    if num_ranks() > 1:
        dist.barrier()


def max_over_ranks(number: int, device: torch.device) -> int:
    """The largest of all ranks' numbers."""
    if num_ranks() == 1:
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def made_by_first_rank(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank once it is done; it must pickle."""
    made = [make() if is_first_rank() else None]
    if num_ranks() > 1:
        dist.broadcast_object_list(made)
    return made[0]


def of_all_ranks(own: Any) -> list[Any]:
    """Every rank's own object, by rank; each must pickle."""
    if num_ranks() == 1:
        return [own]
    gathered: list[Any] = [None] * num_ranks()
    dist.all_gather_object(gathered, own)
    return gathered

"""What this process says to other ranks: calls and bytes of collectives by kind, whoever makes them.

    with Traffic() as seen:
        engine.step()
    seen.calls["all_reduce"], seen.bytes["all_reduce"], seen.sent

Every collective of torch.distributed is an operator, `c10d::...`, that passes here on its way to gloo or NCCL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
"""By operator of c10d."""
WHOLE = {"reduce_scatter": 1, "all_to_all": 1, "scatter": 1}
"""Which argument holds what travels, where that is not the first."""


class Traffic(TorchDispatchMode):
    """Counts the collectives of this thread, and of backward passes that it runs, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        """By kind, such as all_reduce."""
        self.bytes: Counter[str] = Counter()
        """By kind, of the whole message: what is reduced, and what every rank has after a gather."""
        self.sent = 0.0
        """Bytes that this rank sends, in rings: of all_reduce 2 (n - 1) / n times the message."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name in KINDS:
            kind = KINDS[name]
            num_bytes = sum(tensor.nbytes for tensor in _tensors(args[WHOLE.get(kind, 0)]))
            group = next(each for each in args if isinstance(each, torch.ScriptObject))
            num_ranks = ProcessGroup.unbox(group).size()
            self.calls[kind] += 1
            self.bytes[kind] += num_bytes
            share = (num_ranks - 1) / num_ranks
            self.sent += num_bytes * {"all_reduce": 2 * share, "receive": 0, "barrier": 0, "send": 1}.get(kind, share)
        return func(*args, **(kwargs or {}))


def _tensors(given: Tensor | Iterable[Any]) -> Iterator[Tensor]:
    if isinstance(given, Tensor):
        yield given
    else:
        for each in given:
            yield from _tensors(each)

"""One new token per row through the policy: launched kernel by kernel, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tempsamp_kernels.head import mm, multiplies_into_fp32
from torch import Tensor

from tempsamp_fast.rollout.answers import Answers
from tempsamp_fast.rollout.kv_cache import DecodeCache
from tempsamp_fast.rollout.rooms import Rooms
from tempsamp_fast.rollout.sampler import draw

RETIRE_SHARE = 1 / 8
"""Finished rows are dropped once they are this share of all."""
Replay = Callable[[], object]


@dataclass(frozen=True)
class _NewTokens:
    """The newest token of every row; a `PolicyInput`."""

    input_ids: Tensor
    """[R, 1] int64."""
    position_ids: Tensor
    """[3, R, 1] int64."""
    logit_indices: Tensor
    """[R] int64."""


class Decoder:
    """Passes over the newest token of the rows that still run, launched kernel by kernel."""

    def begin(self) -> Rooms:
        """Where a rollout keeps its tensors."""
        return Rooms()

    def remaining(self, slots: Sequence[int], is_finished: Sequence[bool]) -> list[int] | None:
        """Which of the decoded `slots` to go on with; None: all of them. is_finished: by slot."""
        running = [slot for slot in slots if not is_finished[slot]]
        num_finished = len(slots) - len(running)
        return running if running and num_finished >= max(1, RETIRE_SHARE * len(slots)) else None

    def __call__(self, policy: Any, cache: DecodeCache, answers: Answers) -> None:
        """Pass the newest tokens through the policy and draw the next ones."""
        decode_token(policy, cache, answers)


class GraphDecoder(Decoder):
    """The same passes as CUDA graphs, kept from rollout to rollout: recorded once for a number of rows and its halves.

    Rows are halved when half of them have finished, finished ones filling up. Recorded anew where the room for prompts
    or answers had to grow. Nothing in a pass may wait for the GPU or allocate outside the graph's pool:
    partitioned parameters (ZeRO-3), which are gathered on the way, cannot be recorded.
    """

    def __init__(self) -> None:
        self._rooms = Rooms()
        self._version = 0
        self._graphs: dict[Hashable, Replay] = {}
        self._pool: Any = None

    def begin(self) -> Rooms:
        """The same as before."""
        return self._rooms

    def remaining(self, slots: Sequence[int], is_finished: Sequence[bool]) -> list[int] | None:
        """See `Decoder.remaining`."""
        size = (len(slots) + 1) // 2
        running = [slot for slot in slots if not is_finished[slot]]
        if size == len(slots) or not 0 < len(running) <= size:
            return None
        others = [slot for slot in slots if is_finished[slot]]
        return sorted(running + others[: size - len(running)])

    def __call__(self, policy: Any, cache: DecodeCache, answers: Answers) -> None:
        """See `Decoder.__call__`."""
        if self._version != self._rooms.version:
            self._graphs.clear()
            self._version, self._pool = self._rooms.version, None
        params = answers.params
        rows = len(answers.starts), len(cache.rows.slots)
        key = policy, *rows, params.temperature, params.top_p, params.top_k
        if key not in self._graphs:
            changing = [cache.step, *answers.changing(), *cache.recurrence.tensors()]
            saved = [tensor.clone() for tensor in changing]
            self._graphs[key], self._pool = record_cuda_graph(lambda: decode_token(policy, cache, answers), self._pool)
            for tensor, was in zip(changing, saved, strict=True):
                tensor.copy_(was)
        self._graphs[key]()


def decode_token(policy: Any, cache: DecodeCache, answers: Answers) -> None:
    """Pass the newest token of every selected row through the policy and draw the next ones."""
    slots = cache.rows.slots
    new = _NewTokens(
        input_ids=answers.tokens.index_select(0, slots)[:, None],
        position_ids=(answers.starts.index_select(0, slots) + cache.step).expand(3, -1)[..., None],
        logit_indices=cache.order,
    )
    logits = policy(new, next_token_logits, attention=cache)
    cache.step.add_(1)
    draw(logits, answers, slots)


def record_cuda_graph(run: Callable[[], object], pool: Any) -> tuple[Replay, Any]:
    """Record the kernels of `run`, which may not depend on anything but the contents of the tensors that it reads.

    pool: of another graph's memory, to be shared with it; None: a new one. Returns what launches the kernels again, and
    the pool.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles kernels and makes library handles, which a recording cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that prepare videos meanwhile do as they like.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay, graph.pool()


def next_token_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [M, hidden_size], weight [vocab_size, hidden_size] -> float32 [M, vocab_size], as the loss has its own."""
    if multiplies_into_fp32(hidden.device.type, hidden.dtype):
        return mm(hidden, weight.T)
    return hidden.float() @ weight.float().T

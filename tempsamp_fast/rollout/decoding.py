"""One new token per row through the policy: launched kernel by kernel, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tempsamp_kernels.head import mm, multiplies_into_fp32
from torch import Tensor

from tempsamp_fast.rollout.kv_cache import SharedPrefixCache

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
    """Passes of a policy over the newest tokens, whose keys and values `cache` keeps."""

    def __init__(self, policy: Any, cache: SharedPrefixCache) -> None:
        self._policy = policy
        self._cache = cache

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions [R] int64 -> logits [R, vocab_size]; read them before the next call."""
        self._cache.advance()
        return self._run(_new_tokens(tokens, positions))

    def _run(self, new: _NewTokens) -> Tensor:
        return self._policy(new, next_token_logits, attention=self._cache)


class GraphDecoder(Decoder):
    """The same passes as a CUDA graph, recorded anew whenever rows retire or their room grows.

    A recording costs about three passes. Nothing in a pass may wait for the GPU or allocate outside the graph's pool:
    partitioned parameters (ZeRO-3), which are gathered on the way, cannot be recorded.
    """

    def __init__(self, policy: Any, cache: SharedPrefixCache) -> None:
        super().__init__(policy, cache)
        self._version: int | None = None
        self._replay: Replay | None = None

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self._cache.advance()
        new = _new_tokens(tokens, positions)
        if self._replay is None or self._version != self._cache.version:
            self._replay = None  # gives the memory of the last graph back
            self._inputs, self._version = new, self._cache.version
            # Recording runs the pass, and linear layers would take its tokens in twice.
            saved = self._cache.recurrence.saved()
            self._replay, self._logits = record_cuda_graph(lambda: self._run(self._inputs))
            self._cache.recurrence.restore(saved)
        self._inputs.input_ids.copy_(new.input_ids)
        self._inputs.position_ids.copy_(new.position_ids)
        self._replay()
        return self._logits


def record_cuda_graph(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Record the kernels of `run`, which may not depend on anything but the contents of the tensors that it reads.

    Returns what launches them again, and the tensor that this fills.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles kernels and makes library handles, which a recording cannot
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads that prepare videos meanwhile do as they like.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output


def next_token_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [M, hidden_size], weight [vocab_size, hidden_size] -> float32 [M, vocab_size], as the loss has its own."""
    if multiplies_into_fp32(hidden.device.type, hidden.dtype):
        return mm(hidden, weight.T)
    return hidden.float() @ weight.float().T


def _new_tokens(tokens: Tensor, positions: Tensor) -> _NewTokens:
    return _NewTokens(
        input_ids=tokens[:, None].clone(),
        position_ids=positions.repeat(3, 1)[..., None],
        logit_indices=torch.arange(len(tokens), device=tokens.device),
    )

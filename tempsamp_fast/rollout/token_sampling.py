"""From logits to tokens: explicit parameters, and noise keyed by what is sampled rather than by where it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast.config.setting import require


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn; never merged with a checkpoint's generation_config.

    temperature: divides the logits; 0 is greedy.
    top_k: only the k likeliest tokens; 0 is off.
    top_p: of those, the likeliest ones that reach this probability together; 1 is off.
    max_completion_length: in tokens, end-of-sequence included.
    Raises ValueError for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_length: int = 256

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(self.max_completion_length >= 1, "max_completion_length", self.max_completion_length, "at least 1")


def choose_tokens(
    logits: Tensor, params: SamplingParams, uniforms: Tensor, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    logits: [R, vocab_size]. uniforms: [R] float64 in [0, 1). banned: [vocab_size] bool, ids that are never drawn.
    Returns token ids [R] int64 and their log-probs [R] float32: the policy's own at this temperature (1 if greedy),
    over the whole vocabulary, before ids are banned or cut by top_k and top_p, as training recomputes them.
    """
    logits = logits.float() / (params.temperature or 1.0)
    logps = logits.log_softmax(-1)
    allowed = logits if banned is None else logits.masked_fill(banned, float("-inf"))
    if params.temperature == 0:
        tokens = allowed.argmax(-1)
    else:
        cdf = _truncate(allowed.softmax(-1), params).double().cumsum(-1)
        tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # beyond it only where logits are NaN, and so is the log-prob
    return tokens, logps.gather(-1, tokens[:, None])[:, 0]


def _truncate(probs: Tensor, params: SamplingParams) -> Tensor:
    """Zero what top_k and then top_p cut off; not renormalised."""
    if params.top_k and params.top_k < probs.shape[-1]:
        smallest_kept = probs.topk(params.top_k).values[:, -1:]
        probs = probs.masked_fill(probs < smallest_kept, 0.0)
    if params.top_p < 1:
        ordered, order = (probs / probs.sum(-1, keepdim=True)).sort(descending=True, stable=True)
        is_cut = ordered.cumsum(-1) - ordered >= params.top_p
        probs = probs.masked_fill(torch.zeros_like(is_cut).scatter(-1, order, is_cut), 0.0)
    return probs


class SampleNoise:
    """One uniform number per row and token, a pure function of the seed, the row's name and the token's index.

    It depends neither on the rank nor on what else is sampled beside a row (splitmix64 over a BLAKE2 key per row).
    """

    def __init__(self, seed: Sequence[int], row_names: Sequence[str]) -> None:
        digests = [hashlib.blake2b(f"{tuple(seed)} {name}".encode(), digest_size=8).digest() for name in row_names]
        self._keys = np.frombuffer(b"".join(digests), dtype=np.uint64)

    def bits(self, num_tokens: int) -> Tensor:
        """[rows, num_tokens] int64 in [0, 2**32), on the CPU: `uniforms` of them are the numbers."""
        offsets = np.arange(1, num_tokens + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = self._keys[:, None] + offsets
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)
        return torch.from_numpy(bits.astype(np.int64))


def uniforms(bits: Tensor) -> Tensor:
    """int64 in [0, 2**32) -> float64 in [0, 1), of the same shape."""
    return bits.double() * 2.0**-32

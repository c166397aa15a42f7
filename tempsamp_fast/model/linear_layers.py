"""Gated DeltaNet layers over packed rows: every branch goes on from the state in which its parent ended.

A layer keeps what it has read in a state (Gated Delta Networks, arXiv 2412.06464, equation 10) and in the last inputs
of a short causal convolution. Both are computed once per node of a row's trees and handed to all of its children, so
that a prompt is read once however many answers continue it. How tokens follow each other travels as `recurrence` of
the keyword `packed_attention`; without that keyword the layers are transformers' own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import repeat
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad, silu, softplus
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from tempsamp_fast.model.layout import GroupLayout

logger = logging.getLogger(__name__)

HAS_FLA = find_spec("fla") is not None
"""Whether flash-linear-attention is installed."""
CHUNK = 64
"""Tokens whose corrections to the state are solved for together."""
DECAYS = ("A_log", "dt_bias")
"""Parameters [heads] that say how fast a layer forgets."""
UNROUNDED = "_unrounded"
"""After the name of a parameter, that of a buffer with its values in float32."""
State = tuple[Tensor, Tensor]
"""Of one layer, for S sequences: what they have read [S, heads, key_dim, value_dim], at least float32, and the last
inputs of the convolution [S, kernel - 1, channels]."""


class Recurrence(Protocol):
    """How the tokens of one forward pass follow each other, in every linear layer."""

    def convolve(self, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """inputs [B, N, channels], weight [channels, kernel] -> SiLU of the causal convolution, [B, N, channels]."""

    def delta_rule(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        """query, key [B, N, key_heads, key_dim], value [B, N, heads, value_dim], log_decay and beta [B, N, heads].

        Queries and keys are normalised here. Returns [B, N, heads, value_dim].
        """

    def gated_norm(self, norm: Any, values: Tensor, gate: Tensor) -> Tensor:
        """transformers' `norm` of what the delta rule gave, times SiLU of the gate; all [B, N, heads, value_dim]."""


def use_packed_recurrence(model: PreTrainedModel) -> None:
    """Let the linear layers of `model`, if it has any, follow the keyword `packed_attention`."""
    layers = linear_layers(model)
    for layer in layers:
        layer.forward = MethodType(packed_forward, layer)
    if layers and torch.cuda.is_available() and not HAS_FLA:
        logger.warning(
            "flash-linear-attention is not installed: linear layers run on torch's operations, many times slower; "
            "pip install 'tempsamp-fast[linear]'"
        )


def linear_layers(model: nn.Module) -> list[Any]:
    """The Gated DeltaNet modules of `model`. They read the weights of their convolution without calling it."""
    return [module.linear_attn for module in model.modules() if hasattr(module, "linear_attn")]


def packed_forward(
    layer: Any, hidden_states: Tensor, *args: Any, packed_attention: Any = None, **kwargs: Any
) -> Tensor:
    """The forward of a Gated DeltaNet `layer` of transformers: [B, N, hidden_size] -> the same shape."""
    if packed_attention is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    recurrence, index = packed_attention.recurrence, layer.layer_idx
    mixed = recurrence.convolve(index, layer.in_proj_qkv(hidden_states), layer.conv1d.weight[:, 0])
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (tensor.unflatten(-1, (-1, layer.head_k_dim)) for tensor in (query, key))
    wide = at_least_float32(hidden_states.dtype)
    a_log, dt_bias = (unrounded(layer, name).to(wide) for name in DECAYS)
    log_decay = -a_log.exp() * softplus(layer.in_proj_a(hidden_states).to(wide) + dt_bias)
    value, beta = value.unflatten(-1, (-1, layer.head_v_dim)), layer.in_proj_b(hidden_states).sigmoid()
    output = recurrence.delta_rule(index, query, key, value, log_decay, beta)
    gate = layer.in_proj_z(hidden_states).unflatten(-1, (-1, layer.head_v_dim))
    return layer.out_proj(recurrence.gated_norm(layer.norm, output, gate).flatten(-2))


def unrounded(layer: Any, name: str) -> Tensor:
    """A parameter of a layer, by its values before rounding where they are kept; the gradient goes to the rounded."""
    parameter, kept = getattr(layer, name), getattr(layer, name + UNROUNDED, None)
    return parameter if kept is None else kept + (parameter - parameter.detach())


class TreeRecurrence:
    """A `Recurrence` of torch's operations over a row of trees, in any dtype: a call per level of the trees.

    Nodes of a level run as one batch, padded on the right, unless more than half of it were padding.

    before: by layer, states that roots go on from; None: from nothing. roots: of which of the S each does.
    """

    def __init__(
        self, layout: Sequence[GroupLayout], before: Mapping[int, State] | None = None, roots: Sequence[int] = ()
    ) -> None:
        self._before, self._roots = before, list(roots)
        self.keep = False
        """Whether `after` collects how the leaves end: the prompts of a row without answers."""
        self._lengths: list[int] = []
        self._parents: list[int | None] = []
        self._levels: list[list[int]] = []
        self._ends: list[int] = []
        for group in layout:
            first = len(self._lengths)
            for index, node in enumerate(group.nodes):
                depth = len(node.path)
                if depth == len(self._levels):
                    self._levels.append([])
                self._levels[depth].append(first + index)
                if node.is_leaf:
                    self._ends.append(first + index)
                self._lengths.append(node.length)
                self._parents.append(first + node.path[-1] if node.path else None)
        self._tails: dict[int, Tensor] = {}
        self.after: dict[int, State] = {}
        """By layer: how the leaves end, in order."""

    def gated_norm(self, norm: Any, values: Tensor, gate: Tensor) -> Tensor:
        return norm(values, gate)

    def convolve(self, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        """All nodes in one convolution, each behind the last inputs on its path."""
        num_before = weight.shape[1] - 1
        begun = self._begun(layer_index, 1, inputs.new_zeros(num_before, inputs.shape[-1]))
        pieces: list[Tensor] = []
        tails: list[Tensor] = []
        for parent, tokens in zip(self._parents, inputs[0].split(self._lengths), strict=True):
            tail = next(begun) if parent is None else tails[parent]
            pieces += [tail, tokens]
            tails.append(torch.cat([tail, tokens[-num_before:]])[-num_before:])
        if self.keep:
            # A checkpointed layer comes by a second time, in the backward pass.
            self._tails.setdefault(layer_index, torch.stack([tails[end] for end in self._ends]))
        laid_out = torch.cat(pieces).T[None]
        convolved = silu(conv1d(laid_out, weight[:, None], groups=len(weight)))[0].T
        spans = [length for own in self._lengths for length in (own, num_before)][:-1]
        return torch.cat(convolved.split(spans)[::2])[None]

    def delta_rule(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        wide = at_least_float32(value.dtype)
        by_node = [each[0].to(wide).split(self._lengths) for each in (query, key, value, log_decay, beta)]
        outputs: list[Tensor] = [value] * len(self._lengths)
        states: list[Tensor] = [value] * len(self._lengths)
        begun = self._begun(layer_index, 0, value.new_zeros(value.shape[2], key.shape[3], value.shape[3], dtype=wide))
        for level in self._levels:
            for nodes in self._batches(level):
                parents = [self._parents[node] for node in nodes]
                state = torch.stack([next(begun) if parent is None else states[parent] for parent in parents])
                batch = [pad_sequence([pieces[node] for node in nodes], batch_first=True) for pieces in by_node]
                with torch.autocast(value.device.type, enabled=False):
                    output, state = chunked_delta_rule(*(*batch, state))
                for place, node in enumerate(nodes):
                    outputs[node], states[node] = output[place, : self._lengths[node]], state[place]
        if self.keep:
            kept = torch.stack([states[end] for end in self._ends])
            self.after.setdefault(layer_index, (kept, self._tails[layer_index]))
        return torch.cat(outputs)[None].to(value.dtype)

    def _begun(self, layer_index: int, part: int, nothing: Tensor) -> Iterator[Tensor]:
        """What root after root goes on from: a part of its `State`."""
        if self._before is None:
            return repeat(nothing)
        states = self._before[layer_index][part].unbind()
        return iter([states[root] for root in self._roots])

    def _batches(self, level: Sequence[int]) -> list[list[int]]:
        lengths = [self._lengths[node] for node in level]
        return [list(level)] if max(lengths) * len(level) <= 2 * sum(lengths) else [[node] for node in level]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """What decays and states are kept in, beside values of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def normalised(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both of unit length along the last dimension, and the query scaled by one over the root of that dimension."""
    unit = lambda tensor: tensor * (tensor.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    return unit(query) * query.shape[-1] ** -0.5, unit(key)


def chunked_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token, state = decay * state + beta * key (value - key . decay * state); output = query . state.

    Done chunk by chunk (Gated Delta Networks, arXiv 2412.06464, section 3.3): within a chunk the corrections of the
    values are one triangular system, and only whole chunks follow one after the other. Tokens of beta 0 and log_decay 0
    leave no trace.

    query, key [B, N, key_heads, key_dim], value [B, N, heads, value_dim], log_decay and beta [B, N, heads], state
    [B, heads, key_dim, value_dim], all of one dtype. Returns [B, N, heads, value_dim] and the last state.
    """
    num_tokens, repeats = query.shape[1], value.shape[2] // key.shape[2]
    size = min(CHUNK, 1 << (num_tokens - 1).bit_length())
    padding = -num_tokens % size

    def chunks(tensor: Tensor) -> Tensor:
        """[B, N, heads, dim] -> [B, heads, chunks, size, dim]."""
        return pad(tensor.transpose(1, 2), (0, 0, 0, padding)).unflatten(2, (-1, size))

    query, key = (chunks(tensor.repeat_interleave(repeats, dim=2)) for tensor in normalised(query, key))
    value, beta, log_decay = chunks(value), chunks(beta[..., None]), chunks(log_decay[..., None])[..., 0]
    total = log_decay.cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    since_start = total.exp()[..., None]
    system = (beta * key) @ key.mT * between
    sides = torch.cat([beta * value, beta * key * since_start], dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own, from_state = solved.split([value.shape[-1], key.shape[-1]], dim=-1)
    seen, query = (query @ key.mT) * between, query * since_start
    key, until_end = key * (total[..., -1:] - total).exp()[..., None], total[..., -1].exp()[..., None, None]
    outputs = []
    for index in range(total.shape[2]):
        corrected = own[:, :, index] - from_state[:, :, index] @ state
        outputs.append(query[:, :, index] @ state + seen[:, :, index] @ corrected)
        state = state * until_end[:, :, index] + key[:, :, index].mT @ corrected
    return torch.cat(outputs, dim=2).transpose(1, 2)[:, :num_tokens], state

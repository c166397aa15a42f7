"""The recurrence of linear layers by the kernels of flash-linear-attention (`pip install tempsamp-fast[linear]`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.linear_layers import CHUNK, HAS_FLA, State, TreeRecurrence
from tempsamp_fast.system.device import sent


@dataclass(frozen=True)
class FlaKernels:
    """What is used of flash-linear-attention."""

    causal_conv1d: Callable[..., Any]
    chunk_gated_delta_rule: Callable[..., Any]
    rms_norm_gated: Callable[..., Any]

    def gated_norm(self, norm: Any, values: Tensor, gate: Tensor) -> Tensor:
        """As of `Recurrence`."""
        return self.rms_norm_gated(values, gate, norm.weight, None, activation="silu", eps=norm.variance_epsilon)


@cache
def fla_kernels() -> FlaKernels | None:
    """The kernels of this installation; None when there are none."""
    if not HAS_FLA:
        return None
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return FlaKernels(causal_conv1d, chunk_gated_delta_rule, rms_norm_gated)


def packed_recurrence(
    layout: Sequence[GroupLayout],
    device: torch.device,
    before: Mapping[int, State] | None = None,
    roots: Sequence[int] = (),
) -> TreeRecurrence:
    """The recurrence of a packed row: by the kernels where they run, on torch's operations elsewhere.

    before, roots: see `TreeRecurrence`.
    """
    kernels = fla_kernels() if device.type == "cuda" else None
    if kernels is None:
        return TreeRecurrence(layout, before, roots)
    return FlaRecurrence(layout, device, kernels, before, roots)


@dataclass(frozen=True)
class _Sequences:
    """Where sequences begin and end in tokens laid end to end; made once, as kernels remember what they made of it."""

    on_device: Tensor
    """[S + 1] int64."""
    on_cpu: Tensor
    chunks: Tensor
    """[number of chunks, 2] int64, on the device: of every chunk its sequence, and which of that it is."""

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device) -> _Sequences:
        bounds = torch.tensor([*accumulate(lengths, initial=0)])
        chunks = [(index, chunk) for index, length in enumerate(lengths) for chunk in range(-(-length // CHUNK))]
        return _Sequences(sent(bounds, device), bounds, sent(torch.tensor(chunks), device))

    def options(self) -> dict[str, Tensor]:
        return {"cu_seqlens": self.on_device, "cu_seqlens_cpu": self.on_cpu, "chunk_indices": self.chunks}


@dataclass(frozen=True)
class _Level:
    """The nodes of one depth."""

    tokens: slice
    """Among the tokens in order of depth."""
    sequences: _Sequences
    parents: Tensor | None
    """[S] int64: which node of the level above each goes on from; None for roots."""


class FlaRecurrence(TreeRecurrence):
    """A `Recurrence` on CUDA: one convolution over all nodes, and a call of the delta rule per level."""

    def __init__(
        self,
        layout: Sequence[GroupLayout],
        device: torch.device,
        kernels: FlaKernels,
        before: Mapping[int, State] | None = None,
        roots: Sequence[int] = (),
    ) -> None:
        super().__init__(layout, before, roots)
        self._device, self._kernels = device, kernels

    def gated_norm(self, norm: Any, values: Tensor, gate: Tensor) -> Tensor:
        return self._kernels.gated_norm(norm, values, gate)

    def convolve(self, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        num_before = weight.shape[1] - 1
        first = inputs.new_zeros(num_before, inputs.shape[-1])
        if self._before is not None:
            first = self._before[layer_index][1].index_select(0, self._begun_from).flatten(0, 1)
        starts, ends = self._tail_indices
        begun = torch.nn.functional.pad(_gathered(first, inputs[0], starts).mT, (1, 0))  # kernels read as many as taps
        options = {"activation": "silu", **self._nodes.options()}
        convolved, _ = self._kernels.causal_conv1d(inputs, weight, initial_state=begun.contiguous(), **options)
        if self.keep:
            self._tails.setdefault(layer_index, _gathered(first, inputs[0], ends))
        return convolved

    def delta_rule(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor
    ) -> Tensor:
        tensors = [query, key, value, log_decay, beta]
        if self._order is not None:
            tensors = [tensor.index_select(1, self._order) for tensor in tensors]
        outputs: list[Tensor] = []
        ended: list[Tensor] = []
        states: Tensor | None = None
        for depth, level in enumerate(self._plan):
            if level.parents is not None:
                assert states is not None
                begun: Tensor | None = states.index_select(0, level.parents)
            else:
                begun = None
                if self._before is not None:
                    begun = self._before[layer_index][0].index_select(0, self._begun_from)
            output, states = self._kernels.chunk_gated_delta_rule(
                *(tensor[:, level.tokens] for tensor in tensors),
                initial_state=begun,
                output_final_state=self.keep or depth + 1 < len(self._plan),
                use_qk_l2norm_in_kernel=True,
                **level.sequences.options(),
            )
            outputs.append(output)
            if self.keep:
                assert states is not None
                ended.append(states)
        if self.keep:
            kept = torch.cat(ended).index_select(0, self._end_places) if len(ended) > 1 else ended[0]
            self.after.setdefault(layer_index, (kept, self._tails[layer_index]))
        output = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        return output if self._back is None else output.index_select(1, self._back)

    @cached_property
    def _nodes(self) -> _Sequences:
        return _Sequences.of(self._lengths, self._device)

    @cached_property
    def _plan(self) -> list[_Level]:
        found, start = [], 0
        for depth, nodes in enumerate(self._levels):
            lengths = [self._lengths[node] for node in nodes]
            parents = None
            if depth:
                place = {node: index for index, node in enumerate(self._levels[depth - 1])}
                names = [self._parents[node] for node in nodes]
                parents = sent(torch.tensor([place[name] for name in names if name is not None]), self._device)
            tokens = slice(start, start + sum(lengths))
            found.append(_Level(tokens, _Sequences.of(lengths, self._device), parents))
            start = tokens.stop
        return found

    @cached_property
    def _order(self) -> Tensor | None:
        """[N] int64: the tokens in order of depth; None where they lie so."""
        starts = [*accumulate(self._lengths, initial=0)]
        order = torch.cat([torch.arange(starts[i], starts[i + 1]) for level in self._levels for i in level])
        return None if torch.equal(order, torch.arange(len(order))) else sent(order, self._device)

    @cached_property
    def _back(self) -> Tensor | None:
        """[N] int64: from there to the order of the row."""
        return None if self._order is None else self._order.argsort()

    @cached_property
    def _end_places(self) -> Tensor:
        """[leaves] int64: where they are among the nodes in order of depth."""
        order = [node for level in self._levels for node in level]
        return sent(torch.tensor([order.index(end) for end in self._ends]), self._device)

    @cached_property
    def _begun_from(self) -> Tensor:
        """[roots] int64: which states before the row they go on from."""
        return sent(torch.tensor(self._roots), self._device)

    @cached_property
    def _tail_indices(self) -> tuple[Tensor, Tensor]:
        """[nodes, 3] and [leaves, 3] int64: the inputs before every node, and the last ones of every leaf.

        Negative ones are before the row: of each root three, those of the last root last.
        """
        starts, path_of = [*accumulate(self._lengths, initial=0)], list[list[int]]()
        before, begun = [], iter(range(-3 * len(self._roots), 0, 3))
        for node, parent in enumerate(self._parents):
            first = next(begun, -3) if parent is None else 0
            path = [first, first + 1, first + 2] if parent is None else path_of[parent]
            before.append(path)
            path_of.append([*path, *range(starts[node], starts[node + 1])][-3:])
        ends = [path_of[end] for end in self._ends]
        return sent(torch.tensor(before), self._device), sent(torch.tensor(ends), self._device)


def _gathered(first: Tensor, inputs: Tensor, indices: Tensor) -> Tensor:
    """Rows of `inputs` [N, channels] at indices [S, 3]; negative ones count back from the end of `first`."""
    taken = inputs.index_select(0, indices.clamp_min(0).flatten()).unflatten(0, indices.shape)
    return torch.where((indices < 0)[..., None], first[indices.clamp_max(-1) + len(first)], taken)

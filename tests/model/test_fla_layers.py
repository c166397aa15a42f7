"""Linear layers by calls of flash-linear-attention: through doubles of its kernels, and themselves interpreted."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, silu
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated
from triton.runtime.autotuner import Autotuner

from tempsamp_fast.model.fla_layers import FlaKernels, FlaRecurrence, fla_kernels, packed_recurrence
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.linear_layers import HAS_FLA, TreeRecurrence, chunked_delta_rule
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tests.model.test_cores import TREES
from tests.model.test_linear_layers import assert_same_with_gradients, inputs

CPU = torch.device("cpu")


def causal_conv1d(
    x, weight, *, initial_state, activation, cu_seqlens, cu_seqlens_cpu, chunk_indices
) -> tuple[Tensor, None]:
    """x [1, N, channels], initial_state [S, channels, taps], of which the first of each is never read."""
    assert activation == "silu" and torch.equal(cu_seqlens, cu_seqlens_cpu)
    assert torch.equal(chunk_indices[:, 0].bincount(), -(-cu_seqlens.diff() // 64))
    outputs = []
    for tokens, begun in zip(x[0].split(cu_seqlens.diff().tolist()), initial_state[..., 1:], strict=True):
        outputs.append(conv1d(torch.cat([begun, tokens.T], dim=1)[None], weight[:, None], groups=len(weight))[0].T)
    return silu(torch.cat(outputs))[None], None


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    *,
    initial_state,
    output_final_state,
    use_qk_l2norm_in_kernel,
    cu_seqlens,
    cu_seqlens_cpu,
    chunk_indices,
) -> tuple[Tensor, Tensor | None]:
    assert use_qk_l2norm_in_kernel and torch.equal(cu_seqlens, cu_seqlens_cpu) and len(chunk_indices)
    lengths = cu_seqlens.diff().tolist()
    if initial_state is None:
        initial_state = v.new_zeros(len(lengths), v.shape[2], k.shape[3], v.shape[3])
    assert len(initial_state) == len(lengths)
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v, g, beta)), initial_state.split(1), strict=True)
    found = [chunked_delta_rule(*tensors) for tensors in pieces]
    states = torch.cat([state for _, state in found]) if output_final_state else None
    return torch.cat([output for output, _ in found], dim=1), states


def rms_norm_gated(x, g, weight, bias, *, activation, eps) -> Tensor:
    assert bias is None and activation == "silu"
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * silu(g)


DOUBLES = FlaKernels(causal_conv1d, chunk_gated_delta_rule, rms_norm_gated)


@pytest.mark.parametrize("tiny", ["qwen3_5"], indirect=True)
@pytest.mark.parametrize("max_tokens_per_row", [160, 10_000], ids=["in_stages", "one_row"])
def test_a_call_per_level_equals_plain(exact, tiny, max_tokens_per_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, groups longer than a row too."""
    by_calls = lambda layout, device, *before: FlaRecurrence(layout, device, DOUBLES, *before)
    monkeypatch.setattr("tempsamp_fast.model.split_attention.packed_recurrence", by_calls)
    model = exact.model(tiny)
    rows = pack(exact.groups(tiny), config=model.config, max_tokens_per_row=max_tokens_per_row)
    assert any(row.stages for row in rows) == (max_tokens_per_row == 160)
    exact.assert_same(exact.packed_pass(Policy(model, gradient_checkpointing=True), rows), exact.expected(tiny.family))


def both_ways(layout: Sequence[GroupLayout], kernels: FlaKernels, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """Outputs, how the roots end, and all gradients, against torch's operations."""
    num_tokens, generator = sum(group.num_tokens for group in layout), torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)
    leaves = [each.detach().to(dtype) for each in inputs(num_tokens, **sizes)]
    leaves = [*leaves, random(1, num_tokens, 8), random(8, 4), random(2, 3, 8)]
    leaves[5] = torch.cat([leaves[5], -leaves[5]])
    roots = [1 - index % 2 for index in range(len(layout))]

    def run(kind: type[TreeRecurrence], *arguments: object):
        def rule(*tensors: Tensor) -> list[Tensor]:
            *tokens, state, channels, weight, tail = tensors
            recurrence = kind(layout, *arguments, {0: (state, tail)}, roots)
            recurrence.keep = True
            return [recurrence.convolve(0, channels, weight), recurrence.delta_rule(0, *tokens), *recurrence.after[0]]

        return rule

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert_same_with_gradients(run(FlaRecurrence, CPU, kernels), run(TreeRecurrence), leaves)


def test_trees_are_run_level_by_level() -> None:
    both_ways(TREES, DOUBLES, torch.float64, {})


def test_the_kernels_are_for_cuda() -> None:
    assert type(packed_recurrence(TREES, CPU)) is TreeRecurrence


class Index(int):
    """The index of a kernel's loop, which the interpreter leaves without the methods that compiled code has."""

    def to(self, dtype: object) -> Index:
        return self


@pytest.mark.skipif(not HAS_FLA, reason="flash-linear-attention is not installed")
def test_the_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own code, forward and backward; the first of their schedules, as nothing can be timed."""
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: 0.0)
    kernels = fla_kernels()
    assert kernels is not None
    counted = lambda *bounds: map(Index, range(*bounds))
    monkeypatch.setattr(import_module("fla.ops.common.chunk_delta_h"), "range", counted, raising=False)
    both_ways([GroupLayout(70, (3, 1)), GroupLayout(5, (2,))], kernels, torch.float32, {"dims": (16, 16)})


@pytest.mark.skipif(not HAS_FLA, reason="flash-linear-attention is not installed")
def test_the_gated_norm_in_the_interpreter_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: 0.0)
    generator = torch.Generator().manual_seed(0)
    norm = Qwen3_5RMSNormGated(16, eps=1e-3)
    norm.weight.data.normal_(generator=generator)
    values, gate = (torch.randn(1, 5, 2, 16, generator=generator, requires_grad=True) for _ in range(2))
    found = fla_kernels().gated_norm(norm, values, gate)  # type: ignore[union-attr]
    expected = norm(values, gate)
    torch.testing.assert_close(found, expected)
    leaves = [values, gate, norm.weight]
    for ours, theirs in zip(
        *(torch.autograd.grad(each.square().sum(), leaves) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

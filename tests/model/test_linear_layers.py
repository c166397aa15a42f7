"""Gated DeltaNet layers over trees: against the rule token by token, path by path, and with known leaks put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize, pad, silu

from tempsamp_fast.model import linear_layers
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.linear_layers import TreeRecurrence, chunked_delta_rule
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tests.model.test_cores import TREES

HYBRIDS = pytest.mark.parametrize("tiny", ["qwen3_5"], indirect=True)
LEAK = 1e-3
"""Far above the 1e-10 that the gate allows."""


def token_by_token(query, key, value, log_decay, beta, state) -> tuple[Tensor, Tensor]:
    """The rule as the paper writes it, with vectors (Gated Delta Networks, equation 10)."""
    repeats, outputs = value.shape[2] // key.shape[2], []
    query, key = (normalize(each, dim=-1).repeat_interleave(repeats, 2) for each in (query, key))
    for t in range(query.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        found = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        correction = beta[:, t, :, None] * (value[:, t] - found)
        state = state + key[:, t, :, :, None] @ correction[:, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * key.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def inputs(num_tokens: int, batch: int = 1, dims: tuple[int, int] = (6, 5)) -> list[Tensor]:
    """query, key, value, log_decay, beta and a state, in float64, that want gradients."""
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    generator = torch.Generator().manual_seed(num_tokens)
    tokens, heads = (batch, num_tokens), 4
    made = [random(*tokens, 2, dims[0]), random(*tokens, 2, dims[0]), random(*tokens, heads, dims[1])]
    made += [-random(*tokens, heads).square(), random(*tokens, heads).sigmoid(), random(batch, heads, *dims)]
    return [tensor.requires_grad_() for tensor in made]


def assert_same_with_gradients(
    actual: Callable[..., Sequence[Tensor]], expected: Callable[..., Sequence[Tensor]], leaves: list[Tensor]
) -> None:
    results = []
    for rule in (actual, expected):
        found = rule(*leaves)
        weights = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)) for each in found]
        loss = sum((each * weight).sum() for each, weight in zip(found, weights, strict=True))
        results.append([*found, *torch.autograd.grad(loss, leaves, materialize_grads=True)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)  # 1e-6 under the root of the norm


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 65, 150])
def test_chunks_are_the_rule_token_by_token(num_tokens: int) -> None:
    """Its gradients too, that of the state it begins with among them."""
    assert_same_with_gradients(chunked_delta_rule, token_by_token, inputs(num_tokens, batch=2))


def test_padding_leaves_no_trace() -> None:
    leaves = inputs(5)
    padded = [torch.cat([each, torch.zeros_like(each)], dim=1) for each in leaves[:5]]
    output, state = chunked_delta_rule(*padded, leaves[5])
    expected, expected_state = chunked_delta_rule(*leaves)
    torch.testing.assert_close(output[:, :5], expected)
    torch.testing.assert_close(state, expected_state)


def paths(layout: Sequence[GroupLayout]) -> list[tuple[list[int], slice]]:
    """Of every node: the tokens of its path and its own, and where in that its own are."""
    found, start = [], 0
    for group in layout:
        spans = [range(start + node.start, start + node.start + node.length) for node in group.nodes]
        for node, span in zip(group.nodes, spans, strict=True):
            before = [token for each in node.path for token in spans[each]]
            found.append(([*before, *span], slice(len(before), len(before) + len(span))))
        start += group.num_tokens
    return found


@pytest.mark.parametrize("begins", ["from_nothing", "from_states"])
def test_a_tree_is_its_paths(begins: str) -> None:
    """Any depth, children after their parent or level by level: every node is the end of a sequence of its own."""
    num_tokens, kernel = sum(group.num_tokens for group in TREES), 4
    leaves, generator = inputs(num_tokens), torch.Generator().manual_seed(0)
    channels = torch.randn(1, num_tokens, 3, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, kernel, dtype=torch.float64, generator=generator).requires_grad_()
    tail = torch.randn(2, kernel - 1, 3, dtype=torch.float64, generator=generator).requires_grad_()
    leaves[5] = torch.cat([leaves[5], -leaves[5]]).detach().requires_grad_()
    used, roots = begins == "from_states", [1 - index % 2 for index in range(len(TREES))]

    def packed(*tensors: Tensor) -> list[Tensor]:
        *tokens, state, channels, weight, tail = tensors
        recurrence = TreeRecurrence(TREES, {3: (state, tail)} if used else None, roots if used else ())
        recurrence.keep = True
        found = [recurrence.convolve(3, channels, weight), recurrence.delta_rule(3, *tokens)]
        return [*found, *recurrence.after[3]]

    def by_path(*tensors: Tensor) -> list[Tensor]:
        *tokens, state, channels, weight, tail = tensors
        state, tail = (state, tail) if used else (torch.zeros_like(state), torch.zeros_like(tail))
        convolved, outputs, states, tails = [], [], [], []
        nodes = [(node, [root]) for group, root in zip(TREES, roots, strict=True) for node in group.nodes]
        for (node, root), (path, own) in zip(nodes, paths(TREES), strict=True):
            read = torch.cat([tail[root], channels[:, path]], dim=1)
            convolved.append(silu(conv1d(read.mT, weight[:, None], groups=3)).mT[:, own])
            output, after = chunked_delta_rule(*(each[:, path] for each in tokens), state[root])
            outputs.append(output[:, own])
            if node.is_leaf:
                states.append(after)
                tails.append(read[:, 1 - kernel :])
        return [torch.cat(each, dim=1) for each in (convolved, outputs)] + [torch.cat(states), torch.cat(tails)]

    leaves += [channels, weight, tail]
    assert_same_with_gradients(packed, by_path, leaves)


def test_a_batch_is_padded_to_twice_its_tokens_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of one length are one call; a long one beside short ones runs by itself."""
    batches = []
    note = lambda *tensors: batches.append(tensors[0].shape[:2]) or chunked_delta_rule(*tensors)
    monkeypatch.setattr(linear_layers, "chunked_delta_rule", note)
    for lengths in ((3, 4, 4), (1, 1, 20)):
        TreeRecurrence([GroupLayout(9, lengths)]).delta_rule(0, *inputs(9 + sum(lengths))[:5])
    assert batches == [(1, 9), (3, 4), (1, 9), (1, 1), (1, 1), (1, 20)]


# The gate: that of `test_exactness`, which every one of these must fail.


def errors(exact, tiny) -> tuple[float, float]:
    """Of logits, and of the gradient that is furthest off."""
    model = exact.model(tiny)
    rows = pack(exact.groups(tiny), config=model.config, max_tokens_per_row=10_000)
    actual, expected = exact.packed_pass(Policy(model), rows), exact.expected(tiny.family)
    gradients = [exact.error(actual.gradients[name], each) for name, each in expected.gradients.items()]
    return exact.error(actual.logits, expected.logits), max(gradients)


@HYBRIDS
def test_nothing_leaks(exact, tiny) -> None:
    assert max(errors(exact, tiny)) < exact.rtol


@HYBRIDS
@pytest.mark.parametrize(
    ("change", "logits_too"),
    [(torch.zeros_like, True), (lambda state: state.bfloat16().to(state.dtype), True), (Tensor.detach, False)],
    ids=["not_handed_on", "in_bfloat16", "without_gradient"],
)
def test_a_wrong_state_is_seen(exact, tiny, change, logits_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only gradients tell that a state was handed on without its graph."""
    rule = lambda *tensors: chunked_delta_rule(*tensors[:5], change(tensors[5]))
    monkeypatch.setattr(linear_layers, "chunked_delta_rule", rule)
    logits, gradients = errors(exact, tiny)
    assert gradients > LEAK
    assert logits > LEAK if logits_too else logits < exact.rtol


@HYBRIDS
def test_a_convolution_that_reads_over_the_start_of_an_answer_is_seen(
    exact, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def along_the_row(self: TreeRecurrence, layer_index: int, inputs: Tensor, weight: Tensor) -> Tensor:
        return silu(conv1d(pad(inputs.mT, (weight.shape[1] - 1, 0)), weight[:, None], groups=len(weight))).mT

    monkeypatch.setattr(TreeRecurrence, "convolve", along_the_row)
    assert min(errors(exact, tiny)) > LEAK


@HYBRIDS
def test_a_row_read_as_one_sequence_is_seen(exact, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions restart in it, which linear layers do not see."""
    whole = lambda layout, *_: TreeRecurrence([GroupLayout(sum(group.num_tokens for group in layout), ())])
    monkeypatch.setattr("tempsamp_fast.model.split_attention.packed_recurrence", whole)
    assert min(errors(exact, tiny)) > LEAK


@HYBRIDS
def test_a_copy_uses_its_own_weights(tiny) -> None:
    """The reference is a deep copy of the policy."""
    policy = Policy(tiny.model())
    copied = copy.deepcopy(policy)
    for parameter in policy.parameters():
        parameter.data.zero_()
    (row,) = pack(tiny.groups()[:1], config=policy.config, max_tokens_per_row=10_000)
    assert copied(row).abs().sum() > 0

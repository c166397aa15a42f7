"""Log-probs without logits in memory: the tiled kernel against its PyTorch twin, and when it is chosen."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tempsamp_kernels import linear_logprob, logprob
from tempsamp_kernels.head import ChunkedHead
from tempsamp_kernels.tiles import ROWS, tile_statistics, tiles_beat_gemm
from tempsamp_kernels.tokens import HeadOptions, RowStatistics, Tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(num_tokens, hidden_size, vocab_size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(DEVICE, dtype)
    weight = (3 * torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5).to(DEVICE, dtype)
    zeros = torch.zeros(num_tokens, device=DEVICE)
    tokens = Tokens(
        token_ids=torch.randint(vocab_size, (num_tokens,), generator=generator).to(DEVICE),
        temperature=torch.linspace(0.7, 1.4, num_tokens).to(DEVICE),
        **dict.fromkeys(("advantage", "policy_weight", "kl_weight", "old_logps", "ref_logps"), zeros),
    )
    return hidden, weight, tokens


def twin(hidden, weight, tokens, options) -> RowStatistics:
    return logprob.forward_sweep(ChunkedHead(hidden, weight, None, None), tokens, options)


def assert_same(found: RowStatistics, expected: RowStatistics, tolerance: float = 2e-5) -> None:
    for name in ("logp", "entropy", "lse"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "vocab_size"),
    [(1, 5, 2), (130, 70, 37), (3, 64, 1025), (5, 130, 2048 + 37), (0, 4, 9)],
)
def test_statistics_equal_the_twins_for_ragged_shapes(num_tokens, hidden_size, vocab_size):
    """One token and more than a block of them, part of a tile in every dimension, one span and several."""
    hidden, weight, tokens = inputs(num_tokens, hidden_size, vocab_size)
    if num_tokens:
        tokens.token_ids[-1] = vocab_size - 1
    assert_same(
        tile_statistics(hidden, weight, tokens, HeadOptions(impl="triton")), twin(hidden, weight, tokens, HeadOptions())
    )


def test_a_token_outside_the_vocabulary_is_nan_and_harms_no_other():
    hidden, weight, tokens = inputs(3, 16, 1100)
    expected = tile_statistics(hidden, weight, tokens, HeadOptions(impl="triton"))
    tokens.token_ids[0], tokens.token_ids[2] = 1100, -1
    found = tile_statistics(hidden, weight, tokens, HeadOptions(impl="triton"))
    assert found.logp[[0, 2]].isnan().all() and found.logp[1] == expected.logp[1]


def test_bias_scale_softcap_and_strides_are_those_of_the_twin():
    hidden, weight, tokens = inputs(5, 24, 1100)
    hidden, weight = torch.stack([hidden, hidden * torch.nan], -1)[..., 0], weight.T.contiguous().T
    bias = torch.linspace(-1, 1, 1100, device=DEVICE)
    bias[7], tokens.token_ids[:] = -torch.inf, 8
    options = HeadOptions(bias, None, 0.8)
    assert_same(tile_statistics(hidden, weight, tokens, options), twin(hidden, weight, tokens, options))
    options = HeadOptions(bias.clamp(min=-1), 4.0, 0.8)
    assert_same(tile_statistics(hidden, weight, tokens, options), twin(hidden, weight, tokens, options))


def test_confident_tokens_keep_their_digits():
    """Margins up to 30 nats, the target in a span of its own."""
    margins = torch.tensor([5.0, 12.0, 18.0, 24.0, 30.0], device=DEVICE)
    hidden, weight, tokens = inputs(5, 2, 1030)
    hidden = torch.stack([margins, torch.ones_like(margins)], dim=1)
    weight[:] = 0
    weight[:1024, 1] = torch.linspace(-40, 0, 1024, device=DEVICE)
    weight[1024:, 1] = -50
    weight[1027] = torch.tensor([1.0, 0.0], device=DEVICE)
    tokens.token_ids[:], tokens.temperature[:] = 1027, 1.0
    found = tile_statistics(hidden, weight, tokens, HeadOptions())
    logits = hidden.double() @ weight.double().T
    odds = torch.exp(logits - margins[:, None])
    odds[:, 1027] = 0
    torch.testing.assert_close(found.logp.double(), -torch.log1p(odds.sum(-1)), rtol=1e-5, atol=0)


def test_a_token_has_the_same_bits_whatever_stands_beside_it():
    """Not even a token that is no number. NumPy, the interpreter, rounds by the row of a tile."""
    shift = 3 if torch.cuda.is_available() else ROWS
    hidden, weight, tokens = inputs(ROWS + 12, 16, 150)
    together = tile_statistics(hidden, weight, tokens, HeadOptions())
    hidden[1] = torch.nan
    beside = tile_statistics(hidden, weight, tokens, HeadOptions())
    moved = tile_statistics(hidden[shift:], weight, tokens.map(lambda field: field[shift:]), HeadOptions())
    assert beside.logp[1].isnan() and torch.equal(beside.logp[2:], together.logp[2:])
    assert torch.equal(moved.logp, together.logp[shift:]) and torch.equal(moved.entropy, together.entropy[shift:])


def test_tiles_are_for_bf16_heads_whose_logits_cost_more_than_a_slower_product():
    assert tiles_beat_gemm(2048, torch.bfloat16)
    assert not tiles_beat_gemm(3584, torch.bfloat16)
    assert not tiles_beat_gemm(2048, torch.float32)


@pytest.mark.parametrize(
    ("options", "wants_grad", "are_used"),
    [({}, False, True), ({}, True, False), ({"chunk_size": 4}, False, False), ({"impl": "torch"}, False, False)],
)
def test_log_probs_use_tiles_where_nothing_asks_for_gradients_or_fixed_chunks(
    monkeypatch, options, wants_grad, are_used
):
    hidden, weight, tokens = inputs(6, 8, 40)
    tiles = Mock(wraps=tile_statistics)
    monkeypatch.setattr(logprob, "tiles_beat_gemm", lambda *_: True)
    monkeypatch.setattr(logprob, "tile_statistics", tiles)
    with torch.set_grad_enabled(wants_grad):
        found = linear_logprob(
            hidden[None], weight.requires_grad_(), tokens.token_ids[None], **{"impl": "triton", **options}
        )
    tokens.temperature[:] = 1
    expected = twin(hidden, weight.detach(), tokens, HeadOptions())
    torch.testing.assert_close(found[0][0].detach(), expected.logp, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found[1][0].detach(), expected.entropy, rtol=2e-5, atol=2e-5)
    assert tiles.called == are_used


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1000, 151936])
def test_bf16_products_on_tensor_cores_equal_those_of_cublas(vocab_size):
    """In the interpreter bf16 products are wrong, so this is for a GPU alone."""
    hidden, weight, tokens = inputs(300, 2048, vocab_size, torch.bfloat16)
    options = HeadOptions(impl="triton")
    assert_same(tile_statistics(hidden, weight, tokens, options), twin(hidden, weight, tokens, options), 1e-4)

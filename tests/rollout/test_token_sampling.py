"""From logits to tokens."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams, choose_tokens, uniforms

PROBS = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
EVENLY = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


def shares(params: SamplingParams, banned: torch.Tensor | None = None) -> list[float]:
    """How often each id is drawn when the uniforms are spread evenly: its exact probability."""
    logits = PROBS.log() * params.temperature
    tokens, _ = choose_tokens(logits.expand(len(EVENLY), -1), params, EVENLY, banned)
    return [round(share, 3) for share in (torch.bincount(tokens, minlength=5) / len(EVENLY)).tolist()]


def test_tokens_follow_the_softmax_at_the_temperature() -> None:
    assert shares(SamplingParams(temperature=0.7)) == [0.05, 0.4, 0.1, 0.25, 0.2]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert shares(SamplingParams(top_k=2)) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], abs=1e-3)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    """.4 + .25 misses .8, so .2 is kept too and .1 is not."""
    assert shares(SamplingParams(top_p=0.8)) == pytest.approx([0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85], abs=1e-3)


def test_top_p_counts_within_what_top_k_left() -> None:
    assert shares(SamplingParams(top_k=2, top_p=0.6)) == [0, 1, 0, 0, 0]


def test_banned_ids_are_never_drawn_and_the_rest_keeps_its_ratios() -> None:
    banned = torch.tensor([False, True, False, False, False])
    assert shares(SamplingParams(), banned) == pytest.approx(
        [0.05 / 0.6, 0, 0.1 / 0.6, 0.25 / 0.6, 0.2 / 0.6], abs=1e-3
    )


def test_ids_of_probability_zero_are_not_drawn_at_the_ends() -> None:
    logits = torch.tensor([[-math.inf, 1.0, -math.inf], [-math.inf, 1.0, -math.inf]])
    tokens, _ = choose_tokens(logits, SamplingParams(), torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64))
    assert tokens.tolist() == [1, 1]


def test_rare_tokens_are_told_apart_at_the_end_of_the_distribution() -> None:
    """A hundred tokens of 1e-8 each after a certain one: sums in float32 would take sixty of them for the others."""
    probs = torch.cat([torch.tensor([1 - 1e-6], dtype=torch.float64), torch.full((100,), 1e-8, dtype=torch.float64)])
    uniforms = 1 - 1e-6 * (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    tokens, _ = choose_tokens(probs.log().expand(100, -1), SamplingParams(), uniforms)
    assert len(set(tokens.tolist())) > 90


def test_temperature_zero_is_the_largest_allowed_logit() -> None:
    banned = torch.tensor([False, True, False, False, False])
    tokens, logps = choose_tokens(PROBS.log()[None], SamplingParams(temperature=0), EVENLY[:1], banned)
    assert tokens.tolist() == [3]
    assert logps.exp().tolist() == pytest.approx([0.25])


def test_log_probs_are_those_before_truncation_and_banning() -> None:
    banned = torch.tensor([True, False, False, False, False])
    params = SamplingParams(temperature=0.5, top_k=1)
    _, logps = choose_tokens(PROBS.log()[None], params, EVENLY[:1], banned)
    assert logps.exp().item() == pytest.approx(0.4**2 / (PROBS**2).sum().item())


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_completion_length", 0)],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}={value}"):
        SamplingParams(**{field: value})


def test_noise_is_uniform_over_rows_and_over_tokens() -> None:
    """Mean 1/2 and variance 1/12 within four standard errors, no correlation between neighbours."""
    noise = SampleNoise((0, 1), [f"row {index}" for index in range(2000)])
    values = uniforms(noise.bits(20)).T
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / values.numel())
    assert abs(values.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / values.numel())
    for neighbours in (values, values.T):
        pairs = torch.stack([neighbours[:-1].flatten(), neighbours[1:].flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(pairs.shape[1])


def test_noise_depends_on_the_seed_and_the_name_alone() -> None:
    noise = SampleNoise((3, 4), ["a", "b", "c"]).bits(8)
    assert torch.equal(SampleNoise((3, 4), ["x", "b"]).bits(7)[1], noise[1, :7])
    assert SampleNoise((3, 5), ["b"]).bits(8)[0, 7] != noise[1, 7]
    assert noise[0, 7] != noise[1, 7]


def test_the_fewest_that_reach_top_p_exactly_are_kept() -> None:
    """Four equal tokens, their probabilities exact in binary: two make a half."""
    logits = torch.zeros(len(EVENLY), 4)
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.75, 3), (0.76, 4), (1.0, 4)):
        tokens, _ = choose_tokens(logits, SamplingParams(top_p=top_p), EVENLY)
        assert len(tokens.unique()) == kept


def test_noise_is_splitmix64_over_the_key_of_a_row() -> None:
    """Written out with whole numbers, so that a run goes on with the draws it was started with."""
    state, expected = int.from_bytes(hashlib.blake2b(b"(3, 4) a 0", digest_size=8).digest(), "little"), []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        bits = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        expected.append((bits ^ (bits >> 31)) >> 32)
    bits = SampleNoise((3, 4), ["a 0"]).bits(3)[0]
    assert bits.tolist() == expected and uniforms(bits).tolist() == [each / 2**32 for each in expected]

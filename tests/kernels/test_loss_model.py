"""The predicted cost of the loss: that it describes the package's own schedule, and what it may never say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tempsamp_kernels import head

from bench.loss_model import CARDS, HEADS, RATES, SCHEDULES, TOKENS, Schedule, bare, chunk_rows, fused, share


@pytest.mark.parametrize("num_tokens", [1, 2048, 2300, 8192, 32768])
@pytest.mark.parametrize("vocab_size", [50257, 152064, 248320])
def test_chunks_are_those_of_the_package(num_tokens, vocab_size):
    assert Schedule().logits_bytes == head.LOGITS_BYTES["cuda"]
    assert chunk_rows(num_tokens, vocab_size, Schedule()) == head.chunk_rows(num_tokens, vocab_size, "cuda")


@pytest.mark.parametrize("name", HEADS)
def test_no_schedule_is_faster_than_its_gemms_and_every_change_helps_or_does_nothing(name):
    hidden, vocab = HEADS[name]
    for card in CARDS.values():
        for rates in RATES.values():
            for num_tokens in TOKENS:
                shares = [share(num_tokens, HEADS[name], card, rates, schedule) for schedule in SCHEDULES.values()]
                assert shares[0] <= shares[1] <= shares[2] <= shares[4] <= 1.001
                assert shares[2] <= shares[6]
    floor = 6 * 4096 * hidden * vocab
    assert floor <= sum(launch.flops for launch in bare(4096, hidden, vocab, CARDS["H100"])) < 1.2 * floor


def test_a_second_stream_moves_and_computes_the_same():
    one, two = (fused(8192, 3584, 152064, CARDS["H100"], replace(Schedule(), streams=n)) for n in (1, 2))
    for quantity in ("flops", "bytes"):
        assert sum(getattr(launch, quantity) for launch in one) == pytest.approx(
            sum(getattr(launch, quantity) for launch in two)
        )

"""The predicted cost of the loss: that it describes the package's own schedule, and what it may never say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tempsamp_kernels import head

from bench.loss_model import CARDS, HEADS, RATES, SCHEDULES, TOKENS, Schedule, bare, chunk_rows, fused, panels, share

H100, NOW = CARDS["H100"], SCHEDULES["now, side by side"]


@pytest.mark.parametrize("num_tokens", [1, 2048, 2300, 8192, 32768])
@pytest.mark.parametrize("vocab_size", [50257, 152064, 248320])
def test_chunks_and_panels_are_those_of_the_package(num_tokens, vocab_size):
    assert Schedule() == NOW
    assert (NOW.logits_bytes, NOW.gradient_bytes) == (head.LOGITS_BYTES["cuda"], head.GRADIENT_BYTES)
    assert chunk_rows(num_tokens, vocab_size, NOW) == head.chunk_rows(num_tokens, vocab_size, "cuda")
    assert panels(num_tokens, vocab_size, NOW) == head.num_panels(num_tokens, vocab_size)


@pytest.mark.parametrize("name", HEADS)
def test_no_schedule_is_faster_than_its_gemms_and_every_change_helps_or_does_nothing(name):
    hidden, vocab = HEADS[name]
    for card in CARDS.values():
        for rates in RATES.values():
            for num_tokens in TOKENS:
                shares = [share(num_tokens, HEADS[name], card, rates, schedule) for schedule in SCHEDULES.values()]
                assert shares[0] <= shares[1] <= shares[2] and shares[3] <= shares[4] <= shares[5] <= 1.001
                assert shares[3] <= shares[6] <= shares[5]
    floor = 6 * 4096 * hidden * vocab
    assert floor <= sum(launch.flops for launch in bare(4096, hidden, vocab, H100)) < 1.2 * floor


def test_a_second_stream_moves_and_computes_the_same():
    def total(schedule, quantity):
        launches = fused(8192, 3584, 152064, H100, schedule)
        return sum(getattr(each, quantity) for launch in launches for each in (launch, launch.beside) if each)

    for quantity in ("flops", "bytes"):
        assert total(NOW, quantity) == pytest.approx(total(replace(NOW, yields=False), quantity))


@pytest.mark.parametrize("name", HEADS)
def test_the_goals_of_the_prediction_are_met_where_gemms_leave_the_row_kernel_a_seat(name):
    for rates in RATES.values():
        for num_tokens, goal in {2048: 0.85, 4096: 0.9, 8192: 0.9, 16384: 0.9, 32768: 0.9}.items():
            assert share(num_tokens, HEADS[name], H100, rates, NOW) >= goal

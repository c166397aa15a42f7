"""Drawing on the device: the kernel against `choose_tokens`, and what it notes of the answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tempsamp_fast.rollout import sampler
from tempsamp_fast.rollout.answers import Answers
from tempsamp_fast.rollout.rooms import Rooms
from tempsamp_fast.rollout.sampler import draw
from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams, choose_tokens, uniforms
from tests.rollout.compiling import compiles

NUM_ROWS, NUM_TOKENS = 7, 3
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_completion_length=NUM_TOKENS),
    "all": SamplingParams(temperature=0.8, max_completion_length=NUM_TOKENS),
    "top_k": SamplingParams(top_k=12, max_completion_length=NUM_TOKENS),
    "top_p": SamplingParams(top_p=0.7, max_completion_length=NUM_TOKENS),
    "top_k and top_p": SamplingParams(1.3, 0.6, 40, max_completion_length=NUM_TOKENS),
    "more than there are": SamplingParams(top_k=10_000, max_completion_length=NUM_TOKENS),
}


def answers_of(
    params: SamplingParams, vocab_size: int, ends: list[int] | None = None, num_rows: int = NUM_ROWS
) -> Answers:
    noise = SampleNoise((0,), [f"row {index}" for index in range(num_rows)])
    starts, step = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return Answers(Rooms(), noise, params, starts, step, vocab_size, ends or [], [1, 3])


def logits_of(vocab_size: int, num_rows: int = NUM_ROWS) -> Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("vocab_size", [5, pytest.param(300, marks=pytest.mark.slow), 4100])
@pytest.mark.parametrize("name", PARAMS)
def test_the_kernel_draws_what_choose_tokens_does(name: str, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "BLOCK", 128 if vocab_size == 300 else 4096)
    params, logits, slots = PARAMS[name], logits_of(vocab_size), torch.tensor([0, 2, 3, 6])
    answers = answers_of(params, vocab_size)
    answers.step.fill_(1)
    draw(logits, answers, slots, slots, impl="triton")
    numbers = uniforms(answers.noise[slots, 1])
    tokens, logps = choose_tokens(logits[slots], params, numbers, answers.banned)
    assert answers.tokens[slots].tolist() == answers.ids[slots, 1].tolist() == tokens.tolist()
    torch.testing.assert_close(answers.logps[slots, 1], logps, rtol=1e-5, atol=1e-5)
    assert not answers.ids[[1, 4, 5]].any() and not answers.ids[:, [0, 2]].any()


@pytest.mark.parametrize(
    ("impl", "top_p"),
    [
        *(("torch", top_p) for top_p in (0.25, 0.5, 0.76, 1.0)),
        *(("triton", top_p) for top_p in (0.25, 1.0)),
        *(pytest.param("triton", top_p, marks=pytest.mark.slow) for top_p in (0.5, 0.76)),
    ],
)
def test_of_equal_tokens_the_fewest_that_reach_top_p_are_kept(impl: str, top_p: float) -> None:
    answers = answers_of(SamplingParams(top_p=top_p, max_completion_length=1), 6, num_rows=9)
    answers.noise[:, 0] = torch.arange(9) * (2**32 // 9)
    draw(torch.zeros(9, 6), answers, torch.arange(9), impl=impl)
    drawn = set(answers.tokens.tolist())
    assert len(drawn) == {0.25: 1, 0.5: 2, 0.76: 4, 1.0: 4}[top_p] and not drawn & {1, 3}


def test_of_equal_tokens_both_keep_the_same() -> None:
    params = SamplingParams(0.7, 0.5, max_completion_length=1)
    logits = (2 * torch.randn(NUM_ROWS, 40, generator=torch.Generator().manual_seed(2))).round() / 2
    drawn = []
    for impl in ("torch", "triton"):
        answers = answers_of(params, 40)
        draw(logits, answers, torch.arange(NUM_ROWS), impl=impl)
        drawn.append(answers.tokens.tolist())
    assert drawn[0] == drawn[1]


def test_rare_tokens_are_told_apart_at_the_end_of_the_distribution() -> None:
    """A hundred tokens of 1e-8 each after a certain one."""
    answers = answers_of(SamplingParams(max_completion_length=1), 101, num_rows=100)
    answers.banned.zero_()
    probs = torch.cat([torch.tensor([1 - 1e-6], dtype=torch.float64), torch.full((100,), 1e-8, dtype=torch.float64)])
    numbers = 1 - 1e-6 * (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    answers.noise[:, 0] = (numbers * 2**32).long()
    draw(probs.log().float().expand(100, -1).contiguous(), answers, torch.arange(100), impl="triton")
    assert len(set(answers.tokens.tolist())) > 90


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_answer_ends_with_the_first_end_of_sequence(impl: str) -> None:
    """And what is drawn after it changes nothing of its length."""
    answers = answers_of(PARAMS["greedy"], 300, ends=[17, 18, 400])
    peaks = torch.tensor([[17, 2, 17], [5, 18, 17], [5, 6, 7]])
    slots = torch.tensor([1, 4, 5])
    for step in range(NUM_TOKENS):
        logits = torch.nn.functional.one_hot(peaks[:, step], 300).float()
        draw(logits, answers, slots, impl=impl)
        answers.step.add_(1)
    assert torch.equal(answers.ids[slots], peaks)
    assert answers.lengths.tolist() == [3, 1, 3, 3, 2, 3, 3]
    assert answers.finished() == [False, True, False, False, True, False, False]
    (first, second) = answers.by_prompt([4, 3])
    assert [len(each.ids) for each in first] == [3, 1, 3, 3] and second[0].ids.tolist() == [5, 18]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_not_finite_show_in_the_log_prob(value: float, impl: str) -> None:
    answers, logits = answers_of(PARAMS["all"], 300), logits_of(300)
    logits[2, 100] = value
    draw(logits, answers, torch.arange(NUM_ROWS), impl=impl)
    assert answers.logps[:, 0].isfinite().tolist() == [index != 2 for index in range(NUM_ROWS)]
    assert 0 <= int(answers.tokens[2]) < 300


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARAMS)
def test_on_a_gpu_the_kernel_draws_what_torch_does(name: str) -> None:
    """Of a real vocabulary; numbers that lie between two tokens to the last bit may fall on either."""
    noise = SampleNoise((0,), [f"row {index}" for index in range(64)])
    starts, step = (torch.zeros(size, dtype=torch.int64, device="cuda") for size in (64, 1))
    answers = Answers(Rooms(), noise, PARAMS[name], starts, step, 151936, [], [1, 3])
    logits, slots = logits_of(151936, 64).cuda(), torch.arange(64, device="cuda")
    draw(logits, answers, slots, impl="triton")
    numbers = uniforms(answers.noise[:, 0])
    tokens, logps = choose_tokens(logits, PARAMS[name], numbers, answers.banned)
    same = answers.tokens == tokens
    assert same.float().mean() > 0.95
    torch.testing.assert_close(answers.logps[same, 0], logps[same], rtol=1e-4, atol=1e-4)


TYPES = {"logits": "*fp32", "logit_rows": "*i64", "slots": "*i64", "noise": "*i64", "step": "*i64", "banned": "*i1",
         "ends": "*i1", "tokens": "*i64", "ids": "*i64", "logps": "*fp32", "lengths": "*i64", "is_finished": "*i1",
         "inverse_temperature": "fp32", "top_k": "i32", "top_p": "i64", "noise_stride": "i32", "ids_stride": "i32",
         "logps_stride": "i32"}  # fmt: skip


@pytest.mark.parametrize("cuts", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "cut"])
def test_the_kernel_compiles_for_gpus_with_wide_loads_and_without_spills(cuts: bool) -> None:
    sizes: dict[str, Any] = {"vocab_size": 151936, "HAS_LOGIT_ROWS": False, "IS_GREEDY": False, "HAS_TOP_K": cuts}
    sizes |= {"HAS_TOP_P": cuts, "NUM_BLOCKS": 64, "BLOCK": sampler.BLOCK}
    compiles("tempsamp_fast.rollout.sampler:draw_kernel", TYPES, sizes, num_warps=16)

"""Decoding by recorded passes: a double records tensor operations where a CUDA graph would record kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tempsamp_fast.model.attention import text_mask
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import decoding
from tempsamp_fast.rollout.decoding import Replay
from tempsamp_fast.rollout.generate import SampledAnswer, SamplingParams, generate

PARAMS = SamplingParams(max_completion_length=9)
ENDS = list(range(20, 32))


class Recorder:
    """Stands in for `record_cuda_graph`: replays write into one fixed tensor and run none of the pass's Python."""

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        self.num_recordings += 1
        output = torch.full_like(run(), float("nan"))
        traced = make_fx(run)()

        def replay() -> None:
            self.num_replays += 1
            output.copy_(traced())

        return replay, output


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    double = Recorder()
    monkeypatch.setattr(decoding, "record_cuda_graph", double)
    return double


def sample(tiny, **options) -> list[SampledAnswer]:
    prompts = [group.prompt for group in tiny.groups()]
    options = {"eos_token_ids": ENDS, **options}
    answers = generate(Policy(tiny.model()), prompts, 6, PARAMS, seed=(4,), **options)
    return [answer for group in answers for answer in group]


def assert_same(left: list[SampledAnswer], right: list[SampledAnswer]) -> None:
    assert [answer.ids.tolist() for answer in left] == [answer.ids.tolist() for answer in right]
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one.logps, other.logps, rtol=1e-4, atol=1e-5)


def test_replayed_passes_draw_the_same_tokens(tiny, recorder: Recorder) -> None:
    assert_same(sample(tiny, cuda_graphs=True, eos_token_ids=[]), sample(tiny, eos_token_ids=[]))
    assert recorder.num_recordings == 1
    assert recorder.num_replays == PARAMS.max_completion_length - 1


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_rows_that_retire_and_room_that_grows_are_recorded_anew(tiny, recorder: Recorder, monkeypatch) -> None:
    expected = sample(tiny)
    assert min(len(answer.ids) for answer in expected) < 5 < max(len(answer.ids) for answer in expected)
    monkeypatch.setattr("tempsamp_fast.rollout.kv_cache.OWN_TOKENS", 2)
    assert_same(sample(tiny, cuda_graphs=True), expected)
    # Room for 2, 4 and 8 tokens, and one retirement of half of the rows at least.
    assert 4 <= recorder.num_recordings < recorder.num_replays


@pytest.mark.parametrize("room", [1, 2, 7])
def test_room_for_own_tokens_changes_nothing(tiny, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one, the cache grows as it is written, and no key is masked out."""
    expected = sample(tiny)
    monkeypatch.setattr("tempsamp_fast.rollout.kv_cache.OWN_TOKENS", room)
    assert_same(sample(tiny), expected)


def test_a_pass_that_is_recorded_builds_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers up to 5.17 builds one while a stream is captured, though one new token per row needs none."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert text_mask(batch_size=3, q_length=1, kv_length=1) is None
    assert text_mask(batch_size=3, q_length=2, kv_length=5, q_offset=3) is not None


@pytest.mark.gpu
def test_cuda_graphs_draw_the_same_tokens(tiny) -> None:
    policy = Policy(tiny.model().cuda())
    prompts = [group.prompt for group in tiny.groups()]
    draw = lambda graphs: generate(policy, prompts, 6, PARAMS, seed=(4,), eos_token_ids=ENDS, cuda_graphs=graphs)
    flat = lambda answers: [answer for group in answers for answer in group]
    assert_same(flat(draw(True)), flat(draw(False)))

"""Decoding by recorded passes: a double records tensor operations where a CUDA graph would record kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.attention import text_mask
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import decode_attention, decoding, delta_step, sampler
from tempsamp_fast.rollout.answers import Answers, SampledAnswer
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder, Replay
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.rollout.kv_cache import DecodeCache
from tempsamp_fast.rollout.rooms import Rooms

PARAMS = SamplingParams(max_completion_length=9)
ENDS = list(range(20, 32))


class Recorder:
    """Stands in for `record_cuda_graph`: replays write into one fixed tensor and run none of the pass's Python."""

    def __init__(self) -> None:
        self.num_recordings = self.num_replays = 0

    def __call__(self, run: Callable[[], object], pool: object) -> tuple[Replay, object]:
        self.num_recordings += 1
        traced = make_fx(run)()  # runs it once, as warming up does

        def replay() -> None:
            self.num_replays += 1
            traced()

        return replay, pool


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
    assert_same(sample(tiny, decoder=GraphDecoder(), eos_token_ids=[]), sample(tiny, eos_token_ids=[]))
    assert recorder.num_recordings == 1
    assert recorder.num_replays == PARAMS.max_completion_length - 1


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_another_temperature_is_recorded_anew(tiny, recorder: Recorder) -> None:
    """As of a greedy evaluation between rollouts that are not."""
    policy, decoder = Policy(tiny.model()), GraphDecoder()
    prompts = [group.prompt for group in tiny.groups()]

    def draw(temperature: float, decoder: Decoder | None) -> list[SampledAnswer]:
        params = SamplingParams(temperature, max_completion_length=4)
        answers = generate(policy, prompts, 2, params, seed=(4,), eos_token_ids=[], decoder=decoder)
        return [answer for group in answers for answer in group]

    for temperature in (1.0, 0.0):
        assert_same(draw(temperature, decoder), draw(temperature, None))
    assert recorder.num_recordings == 2


class Frozen:
    """Stands in for `record_cuda_graph`: replays run the pass with the Python objects of the rollout that recorded it.

    Its kernels run in Triton's interpreter, so that all they know of this rollout is what the tensors hold.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_recordings = self.num_replays = 0
        self._decode_token, self._seen = decoding.decode_token, []
        monkeypatch.setattr(decoding, "decode_token", self._note)
        monkeypatch.setattr(decoding, "record_cuda_graph", self._record)
        for module in (decode_attention, delta_step, sampler):
            monkeypatch.setattr(module, "choose_impl", lambda *_: "triton")

    def _note(self, policy: Policy, cache: DecodeCache, answers: Answers) -> None:
        frozen = copy.copy(cache)
        frozen.recurrence = copy.copy(cache.recurrence)
        self._seen.append((policy, frozen, answers))

    def _record(self, run: Callable[[], object], pool: object) -> tuple[Replay, object]:
        run()
        self.num_recordings += 1
        seen = self._seen.pop()

        def replay() -> None:
            self.num_replays += 1
            self._decode_token(*seen)

        return replay, pool


@pytest.mark.parametrize("tiny", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_5"], indirect=True)
def test_a_rollout_like_the_one_before_records_nothing(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, other noise, rows that end elsewhere: what was recorded reads what is there now."""
    policy, decoder = Policy(tiny.model()), GraphDecoder()
    first, second, *_ = (group.prompt for group in tiny.groups())
    params = SamplingParams(max_completion_length=4)

    def draw(prompts: list[Prompt], seed: int, decoder: Decoder | None) -> list[SampledAnswer]:
        answers = generate(policy, prompts, 3, params, seed=(seed,), eos_token_ids=ENDS, decoder=decoder)
        return [answer for group in answers for answer in group]

    expected = [draw([second, first], seed, None) for seed in (5, 6)]
    lengths = [[len(answer.ids) for answer in answers] for answers in expected]
    assert lengths[0] != lengths[1] and all(min(each) < 4 for each in lengths)
    monkeypatch.setattr("tempsamp_fast.rollout.kv_cache.OWN_TOKENS", 2)
    graphs = Frozen(monkeypatch)
    for seed in (3, 4, 5, 6):  # the room for answers grows, and rows retire
        draw([first, second], seed, decoder)
    before = graphs.num_recordings
    for seed, answers in zip((5, 6), expected, strict=True):
        assert_same(draw([second, first], seed, decoder), answers)
    assert 1 < before == graphs.num_recordings < graphs.num_replays


def test_programs_beyond_the_spans_of_a_rollout_find_nothing_to_do(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph launches as many as the largest rollout before needed."""
    monkeypatch.setattr("tempsamp_fast.rollout.spans.SMALLEST_PIECE", 4)
    policy, decoder, seen = Policy(tiny.model()), Decoder(), []
    rooms, (long, *_, short) = (
        Rooms(),
        sorted((group.prompt for group in tiny.groups()), key=lambda prompt: -len(prompt.input_ids)),
    )
    monkeypatch.setattr(decoder, "begin", lambda: rooms)
    monkeypatch.setattr(
        "tempsamp_fast.rollout.decoding.decode_token", lambda _, cache, answers: seen.append(cache.rows.items.clone())
    )
    params = SamplingParams(max_completion_length=2)
    params = SamplingParams(max_completion_length=2)
    for prompt in (long, short):
        generate(policy, [prompt], 2, params, seed=(0,), eos_token_ids=[], decoder=decoder)
    first, second = ((items[:, 1] > 0).tolist() for items in seen)
    assert len(first) == len(second) and sum(second) < sum(first)
    assert second == sorted(second, reverse=True) and int(seen[1][:, 3].sum()) == len(short.input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_rows_that_retire_and_room_that_grows_are_recorded_anew(tiny, recorder: Recorder, monkeypatch) -> None:
    expected = sample(tiny)
    assert min(len(answer.ids) for answer in expected) < 5 < max(len(answer.ids) for answer in expected)
    monkeypatch.setattr("tempsamp_fast.rollout.kv_cache.OWN_TOKENS", 2)
    assert_same(sample(tiny, decoder=GraphDecoder()), expected)
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
    draw = lambda decoder: generate(policy, prompts, 6, PARAMS, seed=(4,), eos_token_ids=ENDS, decoder=decoder)
    flat = lambda answers: [answer for group in answers for answer in group]
    assert_same(flat(draw(GraphDecoder())), flat(draw(Decoder())))

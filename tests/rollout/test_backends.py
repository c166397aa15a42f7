"""What the trainer samples through."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.evaluation.asking import evaluate
from tempsamp_fast.rollout import backends
from tempsamp_fast.rollout.backends import PolicyBackend, build_backend
from tempsamp_fast.rollout.decoding import GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams


@pytest.mark.parametrize(
    ("is_partitioned", "gather_weights", "expected"),
    [
        (False, "rollout", ("policy", False)),
        (True, "layer", ("engine", True)),
        (True, "rollout", ("whole", False)),
        (True, "auto", ("whole", False)),
    ],
)
def test_partitioned_parameters_are_gathered_once_or_in_every_pass(
    is_partitioned: bool, gather_weights: str, expected: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(backends, "generate", lambda policy, *_, **options: calls.append((policy, options["synced"])))
    monkeypatch.setattr(backends, "gathered", lambda engine: nullcontext("whole"))
    engine = SimpleNamespace(module="policy", zero_optimization_partition_weights=lambda: is_partitioned)
    config = parse_args(["--gather_weights", gather_weights])
    chat = SimpleNamespace(end_token_ids=[0], banned_token_ids=[])
    backend = build_backend(engine, chat, config.rollout, config.train, config.data.task)  # type: ignore[arg-type]
    backend.generate([], 1, SamplingParams(), (0,))
    ((policy, synced),) = calls
    assert ("engine" if policy is engine else policy, synced) == expected


def test_a_runs_sampler_is_told_what_ends_an_answer_and_what_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(backends, "generate", lambda *_, **options: told.append(options))
    engine = SimpleNamespace(module="policy", zero_optimization_partition_weights=lambda: False)
    config = parse_args(["--max_tokens_per_row", "123"])
    chat = SimpleNamespace(end_token_ids=[7, 8], banned_token_ids=[5])
    backend = build_backend(engine, chat, config.rollout, config.train, config.data.task)  # type: ignore[arg-type]
    backend.generate([], 1, SamplingParams(), (0,))
    names = ("eos_token_ids", "banned_token_ids", "max_tokens_per_row")
    assert [told[0][name] for name in names] == [[7, 8], [5], 123]


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_graphs_are_kept_unless_the_weights_lie_elsewhere_every_time(
    is_partitioned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = []
    monkeypatch.setattr(backends, "generate", lambda *_, decoder, **__: decoders.append(decoder))
    monkeypatch.setattr(backends, "gathered", lambda engine: nullcontext("whole"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    engine = SimpleNamespace(module="policy", zero_optimization_partition_weights=lambda: is_partitioned)
    backend = PolicyBackend(engine, [0], [], 100)
    for _ in range(2):
        backend.generate([], 1, SamplingParams(), (0,))
    assert [type(each) for each in decoders] == [GraphDecoder] * 2
    assert (decoders[0] is decoders[1]) is not is_partitioned


@pytest.mark.parametrize(("is_partitioned", "needed"), [(False, "a CUDA GPU"), (True, "gathered once")])
def test_cuda_graphs_are_refused_where_nothing_can_be_recorded(
    is_partitioned: bool, needed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: is_partitioned)
    engine = SimpleNamespace(module="policy", zero_optimization_partition_weights=lambda: is_partitioned)
    with pytest.raises(ValueError, match=f"cuda_graphs=True needs .*{needed}"):
        PolicyBackend(engine, [0], [], 100, cuda_graphs=True, gathers_once=False)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
def test_every_rank_evaluates_in_as_many_calls(num_samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that has fewer samples, none, or whose videos cannot be read; nothing but its own answers counts."""
    samples = [
        SimpleNamespace(sample_id=str(i), video=f"{i}.mp4", query="", duration_s=1.0, windows=((0.0, 1.0),))
        for i in range(num_samples)
    ]
    unreadable = samples[1:2]
    loader = SimpleNamespace(
        prompts=lambda batch, modes: [SimpleNamespace(sample=each) for each in batch if each not in unreadable]
    )
    num_calls, texts, gathered = [], {}, []
    monkeypatch.setattr("tempsamp_fast.system.ranks.dist.is_initialized", lambda: True)
    monkeypatch.setattr("tempsamp_fast.system.ranks.dist.get_world_size", lambda: 2)

    def all_gather_object(parts: list, own: dict) -> None:
        gathered.append(own)
        parts[:] = [own, {}]

    monkeypatch.setattr("tempsamp_fast.system.ranks.dist.all_gather_object", all_gather_object)
    for rank in range(2):
        monkeypatch.setattr("tempsamp_fast.system.ranks.dist.get_rank", lambda rank=rank: rank)
        calls = []
        sampler = lambda prompts, counts, calls=calls: (
            calls.append(len(prompts))
            or [[SimpleNamespace(text=f"answer to {prompt.sample.sample_id}")] for prompt in prompts]
        )
        evaluate(samples, "answer", sampler, loader, batch_size=2)  # type: ignore[arg-type]
        num_calls.append(len(calls))
    for part in gathered:
        texts |= part
    assert num_calls[0] == num_calls[1] > 0
    assert texts == {each.sample_id: f"answer to {each.sample_id}" for each in samples if each not in unreadable}

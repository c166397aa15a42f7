"""The step and its parts beside what users run otherwise, on the CPU: a 4-layer, 512-wide model in fp32.

Qwen2.5-VL, and where it says so Qwen3.5, of whose layers three are linear and one attends.

    pytest bench/bench_step.py

The vocabulary is small, so that the head weighs beside the layers about what it does in the 7B model (9 against 8 %).
Every benchmark first checks that both sides compute the same, then runs them in turn. `extra_info` holds the ratio
(median over rounds), its spread and its goal. Times are CPU seconds of the whole process, save where a wait is
measured.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import step_contenders as step
from tempsamp_fast.batch import Prompt
from tempsamp_fast.data.prefetch import Prefetch
from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.families import family_named
from tempsamp_fast.model.packing import PackedRow, PackingMode, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.generate import SamplingParams, generate

MODEL = Path(__file__).with_name("step_model.json")
HYBRID_MODEL = Path(__file__).with_name("step_model_qwen3_5.json")
ROUNDS = 3


def tiny_model(seed: int = 0, family: str = "qwen2_5_vl") -> PreTrainedModel:
    torch.manual_seed(seed)
    record: Any = family_named(family)
    return record.model_class(record.config_class.from_json_file(HYBRID_MODEL if family == "qwen3_5" else MODEL))


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(
    benchmark: Any, ours: Callable[[], object], peer: Callable[[], object], goal: float, rounds: int = ROUNDS
) -> None:
    """Time both in turn; ratio of the peer's CPU seconds to ours, by round."""
    peer_s: list[float] = []
    ours_s: list[float] = []
    benchmark.pedantic(
        lambda: ours_s.append(cpu_seconds(ours)), setup=lambda: peer_s.append(cpu_seconds(peer)), rounds=rounds
    )
    report(benchmark, [p / o for p, o in zip(peer_s, ours_s, strict=True)], goal, ours_s=ours_s, peer_s=peer_s)


def report(benchmark: Any, ratios: list[float], goal: float, **extra: object) -> None:
    benchmark.extra_info.update(ratio=median(ratios), spread=[min(ratios), max(ratios)], goal=goal, **extra)


def weighted_log_probs(logits: Tensor, token_ids: Tensor, weights: Tensor) -> Tensor:
    return (weights * logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]).sum()


def weighted_log_probs_of(token_ids: Tensor, weights: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    return weighted_log_probs(hidden @ head.T, token_ids, weights)


def assert_same_gradients(actual: PreTrainedModel, expected: PreTrainedModel) -> None:
    """But for the decays of linear layers: in float32 nearly all of their gradients cancels."""
    for (name, left), right in zip(actual.named_parameters(), expected.parameters(), strict=True):
        if right.grad is not None:
            rtol = 1e-2 if name.endswith(("A_log", "dt_bias", "in_proj_a.weight")) else 1e-3
            assert (left.grad - right.grad).norm() < rtol * right.grad.norm(), name


# (a) The update: a packed row against one row per completion.

TOKEN_SHARES = {(830, 48, 5): 0.9, (2110, 64, 5): 0.9, (2110, 64, 9): 0.87}
"""Goals by (prompt, answer, answers): of the ratio of tokens."""


@pytest.mark.parametrize("shape", TOKEN_SHARES, ids=lambda s: "P{}-C{}-G{}".format(*s))
def test_update_packed_against_one_row_per_completion(benchmark, shape):
    """Text only, which is the hardest case: the tower's share alone would be `num_generations` times."""
    update_packed(benchmark, shape, "qwen2_5_vl", TOKEN_SHARES[shape])


@pytest.mark.parametrize("shape", [(830, 48, 5), (2110, 64, 9)], ids=lambda s: "P{}-C{}-G{}".format(*s))
def test_hybrid_update_packed_against_one_row_per_completion(benchmark, shape):
    """Linear layers take as long for a token of an answer as for one of its prompt."""
    update_packed(benchmark, shape, "qwen3_5", share=0.95)


def update_packed(benchmark: Any, shape: tuple[int, int, int], family: str, share: float) -> None:
    """share: of the ratio of tokens, that is the goal."""
    prompt_len, completion_len, num_generations = shape
    model, policy = tiny_model(family=family), Policy(tiny_model(family=family))
    group = step.random_group(step.make_prompt(prompt_len, (0, 0, 0)), completion_len, num_generations)
    row = step.packed_row(policy, group)
    weights = torch.linspace(-1, 1, len(row.token_ids))

    def separate() -> None:
        for completion, weight in zip(group.completions, weights.split(completion_len), strict=True):
            ids = torch.cat([group.prompt.input_ids, completion.ids])[None]
            logits = model(input_ids=ids, logits_to_keep=completion_len + 1, use_cache=False).logits[0, :-1]
            weighted_log_probs(logits, completion.ids, weight).backward()

    def packed() -> None:
        policy(row, partial(weighted_log_probs_of, row.token_ids, weights)).backward()

    separate()
    packed()
    assert_same_gradients(policy.base_model, model)
    token_ratio = num_generations * (prompt_len + completion_len) / row.num_tokens
    compare(benchmark, packed, separate, goal=share * token_ratio)


# (b) Rollouts: one prefill for all answers against `generate(num_return_sequences=G)`.


def rollout_against_generate(benchmark, family, grid, goal):
    model, policy = tiny_model(family=family), Policy(tiny_model(family=family))
    prompt = step.make_prompt(830, grid)
    greedy = SamplingParams(temperature=0, max_completion_length=24)
    ((answer,),) = generate(policy, [prompt], 1, greedy, seed=(0,), **step.NO_EOS)
    assert answer.ids.tolist() == step.huggingface_generate(model, prompt, 1, 24, sample=False)[0].tolist()
    ours = partial(generate, policy, [prompt], 5, SamplingParams(max_completion_length=24), seed=(0,), **step.NO_EOS)
    compare(benchmark, ours, partial(step.huggingface_generate, model, prompt, 5, 24), goal, rounds=5)


def test_rollout_against_generate(benchmark):
    rollout_against_generate(benchmark, "qwen2_5_vl", (4, 28, 28), goal=2.2)


def test_hybrid_rollout_against_generate(benchmark):
    """Text only."""
    rollout_against_generate(benchmark, "qwen3_5", (0, 0, 0), goal=2.0)


# (c) The whole step against a TimeZero-style one.


def test_step_against_a_plain_huggingface_step(benchmark):
    prompt, num_answers, length = step.make_prompt(2110, (6, 36, 36)), 8, 32
    model, reference = tiny_model(), tiny_model(1).eval()
    policy, packed_reference = Policy(tiny_model()), Policy(tiny_model(1)).eval()
    group = step.random_group(prompt, length, 2)
    answers = torch.stack([completion.ids for completion in group.completions])
    expected = step.separate_loss(model, reference, prompt, answers)
    loss = step.packed_loss(policy, packed_reference, step.packed_row(policy, group))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    loss.backward()
    assert_same_gradients(policy.base_model, model)
    plain_optimizer, optimizer = (torch.optim.AdamW(side.parameters(), lr=1e-6) for side in (model, policy))
    compare(
        benchmark,
        partial(step.packed_step, policy, packed_reference, optimizer, prompt, num_answers, length),
        partial(step.plain_step, model, reference, plain_optimizer, prompt, num_answers, length),
        goal=7.5,
        rounds=2,
    )


# (d) The whole step against trl.GRPOTrainer on text.


def test_step_against_trl(benchmark, tmp_path):
    """Same model, prompt, answer length and sampling; beta 0, AdamW at 1e-6 and clipping at 1 on both sides."""
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    prompt, num_answers, length = step.make_prompt(1024, (0, 0, 0)), 8, 32
    policy = Policy(tiny_model())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    ours = partial(step.packed_step, policy, None, optimizer, prompt, num_answers, length)
    alternating = step.Alternating(ours, time.process_time)
    trainer = step.trl_trainer(
        tiny_model(), prompt, num_answers, length, alternating, folder=str(tmp_path), rounds=ROUNDS,
        bf16=False, gradient_checkpointing=False, use_cpu=True,
    )  # fmt: skip
    group = step.random_group(prompt, length, 2)
    answers = torch.stack([completion.ids for completion in group.completions])
    with torch.no_grad():
        logps = step.packed_log_probs(policy, step.packed_row(policy, group))
    torch.testing.assert_close(logps, step.trl_log_probs(trainer, prompt, answers).flatten(), rtol=1e-4, atol=1e-4)
    benchmark.pedantic(trainer.train, rounds=1)
    seconds = alternating.seconds
    ratios = [trl / ours for trl, ours in zip(seconds["trl_s"], seconds["ours_s"], strict=True)]
    report(benchmark, ratios, goal=5.5, **seconds)


# (e) Four questions about one video as a tree, against the video again for every question or answer.


@pytest.fixture
def asked_together() -> list[Prompt]:
    """Prompts of 1607 tokens in common, the video among them, and of a question of 60 each."""
    first = step.make_prompt(1667, (4, 40, 40))
    question = lambda seed: step.make_prompt(60, (0, 0, 0), seed).input_ids
    ids = [torch.cat([first.input_ids[:1607], question(seed)]) for seed in range(4)]
    return [
        replace(first, input_ids=ids[seed], sample=replace(first.sample, sample_id=f"question-{seed}"))
        for seed in range(4)
    ]


def compare_updates(benchmark: Any, prompts: list[Prompt], mode: PackingMode, goal: float) -> None:
    """Five answers of 48 tokens; the features of the video at hand on both sides, so that the tower is left out."""
    policy, other = Policy(tiny_model()), Policy(tiny_model())
    for each in (policy, other):
        each.base_model.model.visual.requires_grad_(False)
    groups = [step.random_group(prompt, 48, 5) for prompt in with_vision_features(policy, prompts)]
    rows_of = partial(pack, config=policy.config, max_tokens_per_row=step.UNLIMITED)
    trees, others = rows_of(groups), [row for group in groups for row in rows_of([group], mode=mode)]
    weights = torch.linspace(-1, 1, len(trees[0].token_ids))

    def update(of: Policy, rows: list[PackedRow]) -> None:
        of.zero_grad()
        for row, own in zip(rows, weights.split([len(row.token_ids) for row in rows]), strict=True):
            of(row, partial(weighted_log_probs_of, row.token_ids, own)).backward()

    update(policy, trees)
    update(other, others)
    assert_same_gradients(policy.base_model, other.base_model)
    compare(benchmark, partial(update, policy, trees), partial(update, other, others), goal=goal, rounds=2)


def compare_answers(benchmark: Any, prompts: list[Prompt], num_answers: int, temperature: float) -> None:
    """The tower on both sides as it runs: once for the tree, once for each question of the peer."""
    policy, params = Policy(tiny_model()), SamplingParams(temperature, max_completion_length=24)
    apart = [replace(prompt, video=replace(prompt.video)) for prompt in prompts]
    ours, peer = (
        partial(generate, policy, asked, num_answers, params, seed=(0,), **step.NO_EOS) for asked in (prompts, apart)
    )
    for tree, alone in zip(ours(), peer(), strict=True):
        assert [answer.ids.tolist() for answer in tree] == [answer.ids.tolist() for answer in alone]
    compare(benchmark, ours, peer, goal=2.0)


def test_tree_update_against_one_fork_per_question(benchmark, asked_together):
    compare_updates(benchmark, asked_together, "shared_prefix", goal=2.3)


def test_tree_update_against_one_row_per_completion(benchmark, asked_together):
    compare_updates(benchmark, asked_together, "none", goal=8.0)


def test_tree_rollout_against_one_prefill_per_question(benchmark, asked_together):
    compare_answers(benchmark, asked_together, num_answers=5, temperature=1.0)


def test_tree_evaluation_against_one_prefill_per_question(benchmark, asked_together):
    compare_answers(benchmark, asked_together, num_answers=1, temperature=0.0)


# (f) Time blocked on the video queue.


def decode_for(seconds: float) -> None:
    """A stand-in for decoding that, like it, computes without the interpreter lock."""
    end, block = time.perf_counter() + seconds, bytes(2**20)
    while time.perf_counter() < end:
        hashlib.sha256(block).digest()


def test_blocked_on_the_video_queue(benchmark):
    """Decoding takes half of the compute time, in the background; the share of a step spent waiting, after step 3."""
    policy = Policy(tiny_model())
    row = step.packed_row(policy, step.random_group(step.make_prompt(830, (0, 0, 0)), 48, 5))
    compute = lambda: policy(row).sum().backward()
    compute()
    start = time.perf_counter()
    compute()
    decode_s, shares = (time.perf_counter() - start) / 2, []

    def steps() -> None:
        with Prefetch((decode_for(decode_s) for _ in range(12)), depth=2) as videos:
            blocked, begun = 0.0, time.perf_counter()
            for _ in videos:
                compute()
                ended = time.perf_counter()
                shares.append((videos.blocked_s - blocked) / (ended - begun))
                blocked, begun = videos.blocked_s, ended

    benchmark.pedantic(steps, rounds=1)
    report(benchmark, shares[3:], goal=0.05, decode_s=decode_s)


# Peak memory of the update.


def test_peak_memory_of_the_update(benchmark):
    """Resident memory at its worst less that before the step, each side in a process of its own."""
    peaks: dict[str, list[float]] = {"shared_prefix": [], "none": []}

    def measure() -> None:
        for mode, gib in peaks.items():
            command = [sys.executable, "-m", "bench.step_memory", str(MODEL), mode]
            gib.append(float(subprocess.run(command, check=True, capture_output=True).stdout))

    benchmark.pedantic(measure, rounds=2)
    ratios = [packed / unpacked for packed, unpacked in zip(*peaks.values(), strict=True)]
    report(benchmark, ratios, goal=0.35, peak_gib=peaks)

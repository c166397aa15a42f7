"""vLLM itself, on a CPU: `make test-vllm`. Everywhere else these tests skip, and a double stands in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from tempsamp_fast.batch import Prompt, Sample, VideoPatches
from tempsamp_fast.config import ModelConfig
from tempsamp_fast.data.chat import VIDEO_MARKER, Chat
from tempsamp_fast.data.prompts import question
from tempsamp_fast.embedded.model import tiny_model, train_tokenizer
from tempsamp_fast.model.lora import add_adapters
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.rollout.token_sampling import _truncate
from tempsamp_fast.rollout.vllm import VllmBackend, colocated_llm
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run

pytestmark = pytest.mark.vllm
QUERY = "a red square moves left"
NO_DELTA_RULE = "vLLM 0.30 on a CPU has the gated delta rule in bfloat16 alone, and NaN came of what it had loaded"
QWEN3_5 = pytest.param("qwen3_5", marks=pytest.mark.skip(reason=NO_DELTA_RULE))
FAMILIES = ["qwen2_5_vl", "qwen3_vl", QWEN3_5]
TEXTS = [question(QUERY, mode, "grounding") for mode in ("answer", "think")] + ["From 0.25 to 13.75 seconds. 46 89"]
LIMIT = 1e-5


@cache
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 400)


@dataclass
class Sampler:
    """A policy of random weights with vLLM beside it."""

    chat: Chat
    engine: Any
    backend: VllmBackend

    @property
    def policy(self) -> Policy:
        return self.engine.module

    def prompt(self, seed: int, grid: tuple[int, int, int] = (3, 4, 6), second_per_grid: float = 1.0) -> Prompt:
        generator, vision = torch.Generator().manual_seed(seed), self.policy.config.vision_config
        t, h, w = grid
        pixels = torch.randn(t * h * w, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator)
        times = (torch.arange(t, dtype=torch.float64) + 0.25) * second_per_grid
        sample = Sample(f"sample-{seed}", Path("video.mp4"), QUERY, float(t), ((0.0, 1.0),))
        return self.chat.prompt(sample, "answer", "grounding", VideoPatches(pixels, grid, second_per_grid, times))

    def prompts(self) -> list[Prompt]:
        return [self.prompt(1), self.prompt(2, (4, 4, 4), 0.7), self.prompt(3, (5, 2, 6), 2.5)]


def sampler(family: str, kind: str = "tied") -> Sampler:
    model: Any = tiny_model(tokenizer(), family, seed=0).float()
    if kind == "untied":
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    chat = Chat(tokenizer(), model.config)
    if kind == "adapters":
        model = add_adapters(model, ModelConfig(lora_rank=4, lora_targets="q_proj,v_proj,down_proj"), seed=0)
    policy = Policy(model)
    engine = SimpleNamespace(module=policy, global_steps=0, zero_optimization_partition_weights=lambda: False)
    llm = colocated_llm(policy, chat, 600, 0.3, seed=0)
    return Sampler(chat, engine, VllmBackend(engine, chat, "grounding", llm))


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, process_group: None) -> Iterator[Sampler]:
    yield sampler(request.param)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["tied", "untied", "adapters"])
def test_answers_and_log_probs_are_the_policys_before_and_after_a_change_of_weights(
    process_group: None, family: str, kind: str
) -> None:
    """Adapters reach vLLM merged, and the weights beneath them stay the same to the bit."""
    from bench.vllm_cpu import agreement, change_weights

    one = sampler(family, kind)
    for _ in range(2):
        gap, is_equal = agreement(one.engine, one.chat, one.backend, one.prompts())
        assert gap < LIMIT and is_equal
        change_weights(one.engine, by=0.1 if kind == "adapters" else 0.02)
        before = [parameter.detach().clone() for parameter in one.policy.parameters()]
    one.backend.sync_weights()
    assert all(map(torch.equal, before, one.policy.parameters()))


def test_a_frozen_towers_features_outlive_a_change_of_weights(plain: Sampler) -> None:
    from bench.vllm_cpu import agreement, change_weights

    visual = plain.policy.base_model.model.visual.requires_grad_(False)
    prompts = []
    for prompt in plain.prompts():
        features = plain.policy.encode_videos(prompt.video.pixel_values, torch.tensor([prompt.video.grid_thw]))
        prompts.append(replace(prompt, video=replace(prompt.video, features=features)))
    for _ in range(2):
        gap, is_equal = agreement(plain.engine, plain.chat, plain.backend, prompts)
        assert gap < LIMIT and is_equal
        change_weights(plain.engine)
    visual.requires_grad_(True)


@pytest.mark.parametrize("second_per_grid", [0.29, 0.4, 0.7, 1.0, 1 / 3, 2.0, 2.6])
def test_ids_and_positions_are_the_trainers_at_any_frame_rate(plain: Sampler, second_per_grid: float) -> None:
    """Other ids are refused. The same frames at another rate are another video, also to vLLM's caches."""
    grid, found = (40, 2, 2), []
    prompt = plain.prompt(7, grid, second_per_grid)
    ours, _ = mrope_positions(prompt.input_ids, [grid], [second_per_grid], plain.policy.config)
    llm = plain.backend._llm
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    compute = runner.model.get_mrope_input_positions
    runner.model.get_mrope_input_positions = lambda *given, **named: found.append(compute(*given, **named)) or found[-1]
    try:
        plain.backend.sync_weights()
        plain.backend.generate([prompt], 1, SamplingParams(temperature=0, max_completion_length=1), seed=(0,))
    finally:
        del runner.model.get_mrope_input_positions
    ((positions, _),) = found
    assert torch.equal(positions, ours)


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 5), (0.6, 0), (0.8, 8)])
def test_answers_stay_within_top_k_and_top_p(plain: Sampler, top_p: float, top_k: int) -> None:
    """Drawn again by the same seed they are the same, by another one others; never the policy's own by that seed."""
    from bench.vllm_cpu import ids, largest_gap

    params = SamplingParams(temperature=1.3, top_p=top_p, top_k=top_k, max_completion_length=8)
    prompts = plain.prompts()
    plain.backend.sync_weights()
    draw = lambda seed: plain.backend.generate(prompts, [3, 1, 4], params, seed=(0, seed))
    answers = draw(1)
    assert [len(group) for group in answers] == [3, 1, 4]
    assert ids(draw(1)) == ids(answers) != ids(draw(2))
    assert largest_gap(plain.policy, prompts, answers) < LIMIT
    banned = [*plain.chat.banned_token_ids, plain.policy.config.image_token_id, plain.policy.config.video_token_id]
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            logits = _logits(plain.policy, prompt, answer.ids)
            logits[:, banned] = float("-inf")
            kept = _truncate((logits / params.temperature).softmax(-1), params)
            assert bool((kept.gather(-1, answer.ids[:, None]) > 0).all())


def _logits(policy: Policy, prompt: Prompt, answer: Tensor) -> Tensor:
    from tempsamp_fast.batch import Completion, RolloutGroup
    from tempsamp_fast.model.packing import pack

    (row,) = pack([RolloutGroup(prompt, [Completion(answer, "")])], config=policy.config, max_tokens_per_row=10_000)
    return policy(row, lambda hidden, weight: (hidden @ weight.T).detach())


def test_memory_is_flat_over_fifty_syncs(plain: Sampler) -> None:
    from bench.vllm_cpu import change_weights

    sizes = []
    for step in range(60):
        change_weights(plain.engine, by=1e-3)
        plain.backend.sync_weights()
        plain.backend.generate(plain.prompts()[:1], 1, SamplingParams(max_completion_length=2), seed=(step,))
        sizes.append(psutil.Process().memory_info().rss)
    assert sizes[-1] - sizes[9] < 16 << 20


def test_the_threads_of_the_process_stay_the_trainers(process_group: None) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler("qwen2_5_vl")
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_prompts_are_those_of_the_first_processor_and_the_installed_one_keeps_two_markers_more(
    process_group: None,
) -> None:
    """Qwen3-VL's checkpoints were trained on frames between markers of their own, as transformers 4.57 wrote them.

    Since 5.10 its processor replaces the placeholder alone, and the markers around it stay around all frames.
    """
    from transformers import Qwen3VLProcessor

    one = sampler("qwen3_vl")
    prompt = one.prompt(1, (2, 4, 4), second_per_grid=2.0)
    fps, frames = 1.0, [0, 1, 2, 3]
    video = replace(prompt.video, timestamps_s=torch.tensor([0.5, 2.5], dtype=torch.float64))
    ours = one.chat.prompt(prompt.sample, "answer", "grounding", video).input_ids
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>", video_token="<|video_pad|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    processor._calculate_timestamps = lambda *given: Qwen3VLProcessor._calculate_timestamps(processor, *given)
    inputs = {
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "video_metadata": [SimpleNamespace(fps=fps, frames_indices=frames)],
    }
    text, _ = one.chat._question(prompt.sample, "answer", "grounding")
    written = Qwen3VLProcessor.replace_video_token(processor, inputs, 0)
    assert torch.equal(one.chat.encode(text.replace(VIDEO_MARKER, written)), ours)
    theirs = one.chat.encode(text.replace("<|video_pad|>", written, 1))
    assert len(theirs) == len(ours) + 2


RUN = ("--rollout_backend", "vllm", "--beta", "0.04", "--max_completion_length", "8", "--phases")


def test_one_and_two_ranks_train_alike(trainer, tmp_path: Path) -> None:
    """By the launcher: the same prompts a step, one rank accumulating what two share."""
    words = (*RUN, "sft:1,tempsamp:2", "--gradient_accumulation_steps")
    one = trainer.launch(tmp_path / "one", 1, *words, "2")
    two = trainer.launch(tmp_path / "two", 2, *words, "1")
    rows = [[row for row in rows if "loss" in row] for rows in (one, two)]
    assert [len(each) for each in rows] == [3, 3]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3, abs=1e-6)
        assert ours.get("reward/tiou", 0) == pytest.approx(theirs.get("reward/tiou", 0), abs=1e-6)
    assert all(row["rollout/logp_gap"] < LIMIT and "reward/tiou" in row for each in rows for row in each[1:])


def test_a_resumed_run_is_the_undisturbed_run(
    trainer, without_times: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*RUN, "sft:1,tempsamp:3", "--save_steps", "1", "--keep_checkpoints", "2")
    undisturbed = trainer.main(tmp_path / "undisturbed", *words)
    save = Run.save

    def interrupted(run: Run, done: int) -> None:
        if done > 2:
            raise KeyboardInterrupt
        save(run, done)

    monkeypatch.setattr(Run, "save", interrupted)
    with pytest.raises(SystemExit):
        trainer.main(tmp_path / "run", *words)
    monkeypatch.setattr(Run, "save", save)
    trainer.main(tmp_path / "run", "--resume", str(tmp_path / "run"), *words)
    assert without_times(read_metrics(tmp_path / "run")) == without_times(undisturbed)

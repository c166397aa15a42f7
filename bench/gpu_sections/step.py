"""The whole step of the 3B shape, sampling to optimizer: against a TimeZero-style one with video, and TRL's on text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from tempsamp_kernels import linear_logprob
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from bench.bench_step import (
    BETA,
    NO_EOS,
    huggingface_generate,
    make_prompt,
    packed_loss,
    random_group,
    separate_log_probs,
    separate_loss,
    word_tokenizer,
)
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PROMPT_LEN, model_config, on_gpu, random_model
from bench.gpu_sections.timing import event_ms, in_turn, require
from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.packing import PackedRow, pack
from tempsamp_fast.policy import Policy
from tempsamp_fast.rollout import SamplingParams, generate

NUM_ANSWERS, LENGTH, ROUNDS = 8, 32, 4
WIDE_GRID = (8, 28, 64)
"""3584 tokens of a video whose frames are wider than it is long: there transformers' positions agree with ours."""


def measure(record: Record) -> None:
    model = random_model(model_config("3B"))
    policy = Policy(model)
    # AdamW of bf16 parameters: the same small cost on every side.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    with record.attempt("TimeZero-style"):
        measure_against_plain_step(record, policy, optimizer)
    with record.attempt("TRL"):
        measure_against_trl(record, policy, optimizer)


def packed_row(policy: Policy, group: RolloutGroup) -> PackedRow:
    (row,) = pack([group], config=policy.config, max_tokens_per_row=10**9)
    return row.to("cuda")


def fast_step(policy: Policy, reference: Policy | None, optimizer: torch.optim.Optimizer, prompt: Prompt) -> None:
    policy.eval()
    params = SamplingParams(max_completion_length=LENGTH)
    (answers,) = generate(policy, [prompt], NUM_ANSWERS, params, seed=(0,), **NO_EOS)
    policy.train()
    group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
    packed_loss(policy, reference, packed_row(policy, group), BETA if reference else 0.0).backward()
    finish(policy.base_model, optimizer)


def finish(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def plain_loss(model: PreTrainedModel, reference: PreTrainedModel, prompt: Prompt, answers: Tensor) -> Tensor:
    """With recomputation, without which eight rows of this length do not fit."""
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.device("cuda"):
        return separate_loss(model, reference, prompt, answers)


def plain_step(
    model: PreTrainedModel, reference: PreTrainedModel, optimizer: torch.optim.Optimizer, prompt: Prompt
) -> None:
    """Pixels and prompts repeated, full logits, a reference pass of its own; its attention is SDPA, windows batched."""
    model.gradient_checkpointing_disable()
    model.eval()
    with torch.device("cuda"):
        answers = huggingface_generate(model, prompt, NUM_ANSWERS, LENGTH, sample=True)
    plain_loss(model, reference, prompt, answers).backward()
    model.gradient_checkpointing_disable()
    finish(model, optimizer)


@torch.no_grad()
def log_prob_distance(policy: Policy, gpu_prompt: Prompt, group: RolloutGroup) -> float:
    """Mean, between the packed forward pass and the plain one, whose log-softmax rounds to bf16."""
    answers = torch.stack([completion.ids for completion in group.completions]).cuda()
    with torch.device("cuda"):
        expected = separate_log_probs(policy.base_model, gpu_prompt, answers)
    row = packed_row(policy, group)
    actual = policy(row, lambda hidden, weight: linear_logprob(hidden, weight, row.token_ids)[0])
    return (actual - expected.flatten().float()).abs().mean().item()


def measure_against_plain_step(record: Record, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    reference = Policy(random_model(model_config("3B"))).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.002 * torch.randn_like(parameter))
    model, reference_model = policy.base_model, reference.base_model
    prompt = make_prompt(PROMPT_LEN, WIDE_GRID)
    gpu_prompt = on_gpu(prompt)
    group = random_group(prompt, LENGTH, NUM_ANSWERS)
    error = require(log_prob_distance(policy, gpu_prompt, group), 0.05, "mean distance of the log-probs")
    runs = {
        "ours": partial(fast_step, policy, reference, optimizer, prompt),
        "TimeZero-style": partial(plain_step, model, reference_model, optimizer, gpu_prompt),
    }
    times = in_turn(runs, rounds=ROUNDS, warmup=1)
    for name, figures in times.items():
        record.add(
            f"video, {name}",
            **figures,
            over_plain_step=times["TimeZero-style"]["ms"] / figures["ms"],
            rollouts_per_s=1e3 * NUM_ANSWERS / figures["ms"],
            logp_distance=error,
            goals={"over_plain_step": ("at least", 5.0)} if name == "ours" else None,
        )


class Alternating(TrainerCallback):
    """After each of the trainer's steps, one of ours; milliseconds of both, by CUDA events."""

    def __init__(self, ours: Callable[[], object]) -> None:
        self.ours = ours
        self.trl_ms: list[float] = []
        self.ours_ms: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.started = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.started.record()

    def on_step_end(self, *_: object, **__: object) -> None:
        ended = torch.cuda.Event(enable_timing=True)
        ended.record()
        ended.synchronize()
        self.trl_ms.append(self.started.elapsed_time(ended))
        self.ours_ms.append(event_ms(self.ours))


def measure_against_trl(record: Record, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Same shape, prompt, answer length and sampling; beta 0, AdamW at 1e-6 and clipping at 1 on both sides."""
    import datasets
    import trl

    prompt = make_prompt(PROMPT_LEN, (0, 0, 0))
    prompt = replace(prompt, input_ids=prompt.input_ids % 8000 + 1)  # words of `word_tokenizer`
    words = " ".join(f"w{index}" for index in prompt.input_ids.tolist())
    lengths: list[int] = []

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return torch.linspace(0, 1, len(prompts)).tolist()

    alternating = Alternating(partial(fast_step, policy, None, optimizer, prompt))
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=NUM_ANSWERS,
            num_generations=NUM_ANSWERS,
            gradient_accumulation_steps=1,
            max_completion_length=LENGTH,
            generation_kwargs={"min_new_tokens": LENGTH},
            learning_rate=1e-6,
            max_steps=ROUNDS + 1,
            beta=0.0,
            bf16=True,
            gradient_checkpointing=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trl.GRPOTrainer(
            model=random_model(model_config("3B")),
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": words}] * (ROUNDS + 1)),
            processing_class=word_tokenizer(),
            callbacks=[alternating],
        ).train()
    assert set(lengths) == {LENGTH}, f"TRL's answers have lengths {sorted(set(lengths))}"
    trl_ms, ours_ms = alternating.trl_ms[1:], alternating.ours_ms[1:]
    for name, values in (("ours", ours_ms), ("TRL", trl_ms)):
        record.add(
            f"text, {name}",
            ms=median(values),
            spread_ms=[min(values), max(values)],
            over_trl=median(trl_ms) / median(values),
        )

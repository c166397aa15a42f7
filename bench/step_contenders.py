"""One GRPO step on one prompt, by three trainers: ours, one written plainly with Hugging Face's parts, and TRL's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, Sample, VideoPatches
from tempsamp_fast.model.packing import PackedRow, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decoding import Decoder
from tempsamp_fast.rollout.generate import SamplingParams, generate

VOCAB, EOS = 2048, 0
IMAGE, VIDEO, VISION_START, VISION_END = range(VOCAB - 4, VOCAB)
NO_EOS: dict[str, Any] = {"eos_token_ids": [], "banned_token_ids": [EOS, VISION_START, VISION_END]}
UNLIMITED = 10**9
BETA = 0.04


def make_prompt(prompt_len: int, grid_thw: tuple[int, int, int], seed: int = 0) -> Prompt:
    """A video of this grid (none if it has no frames), and text around it up to `prompt_len`.

    Grids are wider than their times are long, where transformers' positions agree with ours.
    """
    generator = torch.Generator().manual_seed(seed)
    t, h, w = grid_thw
    video = [VISION_START, *[VIDEO] * (t * h * w // 4), VISION_END] if t else []
    text = torch.randint(1, IMAGE, (prompt_len - len(video),), generator=generator)
    return Prompt(
        sample=Sample(f"sample-{seed}", Path("video.mp4"), "a query", 30.0, ((0.0, 1.0),)),
        mode="answer",
        input_ids=torch.cat([text[:5], torch.tensor(video, dtype=torch.int64), text[5:]]),
        video=VideoPatches(
            torch.randn(t * h * w, 3 * 2 * 14 * 14, generator=generator), grid_thw, 1.0, torch.arange(t).double()
        ),
    )


def random_group(prompt: Prompt, completion_len: int, num_generations: int) -> RolloutGroup:
    ids = torch.randint(1, IMAGE, (num_generations, completion_len), generator=torch.Generator().manual_seed(1))
    return RolloutGroup(prompt, [Completion(answer, text="") for answer in ids])


def packed_row(policy: Policy, group: RolloutGroup) -> PackedRow:
    """On the policy's device."""
    (row,) = pack([group], config=policy.config, max_tokens_per_row=UNLIMITED)
    return row.to(next(policy.parameters()).device)


def advantages_of(num_answers: int) -> Tensor:
    """Of every contender, whatever its answers."""
    return torch.linspace(-1, 1, num_answers)


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# Ours.


def packed_log_probs(policy: Policy, row: PackedRow) -> Tensor:
    """[M] float32."""
    return policy(row, lambda hidden, weight: linear_logprob(hidden, weight, row.token_ids)[0])


def packed_loss(policy: Policy, reference: Policy | None, row: PackedRow) -> Tensor:
    """With a KL penalty to the reference, if there is one."""
    with torch.no_grad():
        ref_logps = None if reference is None else packed_log_probs(reference, row)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fused_linear_grpo_loss(
            hidden,
            weight,
            row.token_ids,
            row.row_ids,
            advantages=advantages_of(row.num_completions),
            ref_logps=ref_logps,
            loss_type="grpo",
            beta=0.0 if reference is None else BETA,
        )[0]

    return policy(row, loss)


def packed_step(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    prompt: Prompt,
    num_answers: int,
    length: int,
    decoder: Decoder | None = None,
    sampler: Policy | None = None,
) -> None:
    """sampler: of the same weights; None: the policy itself."""
    params = SamplingParams(max_completion_length=length)
    (answers,) = generate(sampler or policy, [prompt], num_answers, params, seed=(0,), decoder=decoder, **NO_EOS)
    group = RolloutGroup(prompt, [Completion(answer.ids, text="") for answer in answers])
    packed_loss(policy, reference, packed_row(policy, group)).backward()
    finish(policy, optimizer)


# A TimeZero-style step: pixels and prompts repeated, full logits, a reference pass of its own.


def huggingface_inputs(prompt: Prompt, copies: int = 1) -> dict[str, Tensor]:
    ids = prompt.input_ids[None].repeat(copies, 1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not prompt.video.grid_thw[0]:
        return text
    return text | {
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
        "pixel_values_videos": prompt.video.pixel_values.repeat(copies, 1),
        "video_grid_thw": torch.tensor([prompt.video.grid_thw], device=ids.device).repeat(copies, 1),
        "second_per_grid_ts": torch.tensor([prompt.video.second_per_grid], device=ids.device).repeat(copies),
    }


def huggingface_generate(
    model: PreTrainedModel, prompt: Prompt, num_answers: int, length: int, *, sample: bool = True, copies: int = 1
) -> Tensor:
    """`generate`, answers of exactly this length: [copies * num_answers, length]."""
    config = GenerationConfig(
        do_sample=sample,
        top_k=0,
        max_new_tokens=length,
        num_return_sequences=num_answers,
        suppress_tokens=[EOS, IMAGE, VIDEO, VISION_START, VISION_END],
        eos_token_id=None,
        pad_token_id=EOS,
    )
    model.eval()
    with prompt.input_ids.device:
        inputs = huggingface_inputs(prompt, copies)
        return model.generate(**inputs, generation_config=config)[:, len(prompt.input_ids) :]


def separate_log_probs(model: PreTrainedModel, prompt: Prompt, answers: Tensor) -> Tensor:
    """[num_answers, completion_len]; row by row after the head, as the released trainers do to save memory."""
    inputs = huggingface_inputs(prompt, len(answers))
    ids = torch.cat([inputs["input_ids"], answers], dim=1)
    zeros = torch.zeros_like(answers, dtype=torch.int32)
    inputs |= {"input_ids": ids, "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)}
    with prompt.input_ids.device:
        logits = model(**inputs | {"attention_mask": torch.ones_like(ids)}, use_cache=False).logits[:, :-1]
    rows = [row.log_softmax(-1).gather(-1, row_ids[1:, None])[:, 0] for row, row_ids in zip(logits, ids, strict=True)]
    return torch.stack(rows)[:, -answers.shape[1] :]


def separate_loss(model: PreTrainedModel, reference: PreTrainedModel, prompt: Prompt, answers: Tensor) -> Tensor:
    logps = separate_log_probs(model, prompt, answers)
    with torch.no_grad():
        delta = separate_log_probs(reference, prompt, answers) - logps.detach()
    delta = delta + logps.detach() - logps
    advantages = advantages_of(len(answers)).to(logps.device)[:, None]
    return -((logps - logps.detach()).exp() * advantages - BETA * (delta.exp() - delta - 1)).mean(1).mean()


def plain_step(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    prompt: Prompt,
    num_answers: int,
    length: int,
    *,
    gradient_checkpointing: bool = False,
) -> None:
    answers = huggingface_generate(model, prompt, num_answers, length)
    model.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    separate_loss(model, reference, prompt, answers).backward()
    model.gradient_checkpointing_disable()
    finish(model, optimizer)


# TRL's trainer, on text.


class Alternating(TrainerCallback):
    """After each of the trainer's steps, one of ours; seconds of both, the first step of each left out."""

    def __init__(self, ours: Callable[[], object], clock: Callable[[], float]) -> None:
        self._ours, self._clock = ours, clock
        self._trl_s: list[float] = []
        self._ours_s: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._started = self._clock()

    def on_step_end(self, *_: object, **__: object) -> None:
        ended = self._clock()
        self._ours()
        self._trl_s.append(ended - self._started)
        self._ours_s.append(self._clock() - ended)

    @property
    def seconds(self) -> dict[str, list[float]]:
        return {"ours_s": self._ours_s[1:], "trl_s": self._trl_s[1:]}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Id i is the word `w<i>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCAB)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{EOS}", pad_token=f"w{EOS}")


def trl_trainer(
    model: PreTrainedModel,
    prompt: Prompt,
    num_answers: int,
    length: int,
    alternating: Alternating,
    *,
    folder: str,
    rounds: int,
    **config: Any,
) -> Any:
    """`GRPOTrainer` for `rounds` timed steps: beta 0, AdamW at 1e-6, clipping at 1, answers of exactly this length.

    `train` raises AssertionError for answers of another length.
    """
    import datasets
    import trl

    words = " ".join(f"w{index}" for index in prompt.input_ids.tolist())

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        assert {len(ids) for ids in completion_ids} == {length}
        return torch.linspace(0, 1, len(prompts)).tolist()

    return trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=num_answers,
            num_generations=num_answers,
            gradient_accumulation_steps=1,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            learning_rate=1e-6,
            max_steps=rounds + 1,
            beta=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **config,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": words}] * (rounds + 1)),
        processing_class=word_tokenizer(),
        callbacks=[alternating],
    )


@torch.no_grad()
def trl_log_probs(trainer: Any, prompt: Prompt, answers: Tensor) -> Tensor:
    """[num_answers, completion_len] of answers [num_answers, completion_len], as the trainer computes them."""
    ids = torch.cat([prompt.input_ids[None].expand(len(answers), -1), answers], dim=1).to(trainer.model.device)
    mask = torch.ones_like(ids)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, answers.shape[1])[0]

"""Answers from the current policy: every prompt prefilled once, the rows of many prompts decoded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.attention import PrefillAttention, packed_attention
from tempsamp_fast.model.packing import PackedRow, pack_prompts
from tempsamp_fast.rollout.answers import Answers, SampledAnswer
from tempsamp_fast.rollout.decoding import Decoder, next_token_logits
from tempsamp_fast.rollout.kv_cache import DecodeCache
from tempsamp_fast.rollout.rooms import Rooms
from tempsamp_fast.rollout.sampler import draw
from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams
from tempsamp_fast.system.ranks import max_over_ranks


@torch.no_grad()
def generate(
    policy: Any,
    prompts: Sequence[Prompt],
    num_completions: int | Sequence[int],
    params: SamplingParams,
    *,
    seed: Sequence[int],
    eos_token_ids: Sequence[int],
    banned_token_ids: Sequence[int] = (),
    max_tokens_per_row: int = 32_768,
    synced: bool = False,
    decoder: Decoder | None = None,
) -> list[list[SampledAnswer]]:
    """Draw `num_completions` answers to every prompt, or a number of its own to each.

    policy: a `Policy`, or a DeepSpeed engine around one.
    seed: any integers, (seed, step) say. What is drawn depends on them, on the prompt's sample id and mode, and on
        the answer's index: not on the rank, nor on the other prompts.
    banned_token_ids: never drawn; the vision placeholders never are.
    max_tokens_per_row: prompt tokens per prefill pass.
    synced: all ranks make the same number of forward passes, as ZeRO-3 needs it.
    decoder: a `GraphDecoder` replays the passes that decode as CUDA graphs, and is worth keeping; None: `Decoder()`.
    Returns the answers by prompt, on the CPU.
    Raises ValueError naming the sample of a prompt that is longer than `max_tokens_per_row`, and FloatingPointError
    naming one at which the logits are not finite.
    """
    if not prompts:
        raise ValueError("prompts is empty")
    counts = [num_completions] * len(prompts) if isinstance(num_completions, int) else list(num_completions)
    with eval_mode(policy):
        config = getattr(policy, "module", policy).config
        decoder = decoder or Decoder()
        rooms = decoder.begin()
        logits, positions, cache = _prefill(policy, prompts, config, max_tokens_per_row, synced, rooms)
        _require_finite(prompts, logits.isfinite().all(-1).tolist())
        prompt_of_row = [index for index, count in enumerate(counts) for _ in range(count)]
        cache.begin(prompt_of_row, config.text_config.num_attention_heads)
        row_prompts = torch.tensor(prompt_of_row).to(logits.device, non_blocking=True)
        names = [
            f"{prompt.sample.sample_id} {prompt.mode} {index}"
            for prompt, count in zip(prompts, counts, strict=True)
            for index in range(count)
        ]
        answers = Answers(
            rooms, SampleNoise(seed, names), params, positions.index_select(0, row_prompts), cache.step,
            logits.shape[-1], eos_token_ids, [*banned_token_ids, config.image_token_id, config.video_token_id],
        )  # fmt: skip
        slots = list(range(len(names)))
        draw(logits, answers, cache.rows.slots, row_prompts)
        for num_own in range(params.max_completion_length - 1):
            is_finished = answers.finished()
            if not _most(is_finished.count(False), synced, logits.device):
                break
            if (remaining := decoder.remaining(slots, is_finished)) is not None:
                slots = remaining
                cache.select(slots)
            cache.make_room(num_own)
            decoder(policy, cache, answers)
        by_prompt = answers.by_prompt(counts)
    _require_finite(prompts, [all(bool(answer.logps.isfinite().all()) for answer in group) for group in by_prompt])
    return by_prompt


def _require_finite(prompts: Sequence[Prompt], are_finite: Sequence[bool]) -> None:
    for prompt, is_finite in zip(prompts, are_finite, strict=True):
        if not is_finite:
            raise FloatingPointError(
                f"sample {prompt.sample.sample_id[:80]!r}: the model's logits are not finite; its weights hold NaN or "
                "infinity, or overflow in this dtype: begin from a sound checkpoint, or with --dtype float32"
            )


@contextmanager
def eval_mode(policy: Any) -> Iterator[None]:
    """Without the dropout of adapters, and without checkpointing."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)


def _prefill(
    policy: Any, prompts: Sequence[Prompt], config: Any, max_tokens_per_row: int, synced: bool, rooms: Rooms
) -> tuple[Tensor, Tensor, DecodeCache]:
    """Logits [P, vocab_size] of each prompt's last token, the positions [P] where its answers start, all keys."""
    parameter = next(policy.parameters())
    rows = pack_prompts(prompts, config=config, max_tokens_per_row=max_tokens_per_row)
    # Agreed upon before the first pass: a pass is a collective of its own under ZeRO-3.
    num_passes = _most(len(rows), synced, parameter.device)
    cache, logits = DecodeCache(rooms, sum(tree.num_tokens for row in rows for tree in row.layout)), []
    core = getattr(policy, "module", policy).attention_core
    for row in rows:
        attention = packed_attention(row.layout, dtype=parameter.dtype, device=parameter.device, core=core)
        prefill = PrefillAttention(row.layout, attention)
        logits.append(policy(row.to(parameter.device), next_token_logits, attention=prefill))
        cache.take(prefill)
    for _ in range(num_passes - len(rows)):
        policy(rows[-1].to(parameter.device), next_token_logits)
    next_positions = torch.cat([_next_positions(row) for row in rows]).to(parameter.device)
    return torch.cat(logits), next_positions, cache


def _next_positions(row: PackedRow) -> Tensor:
    """[prompts of the row] int64: one past the largest position of each."""
    found, start = [], 0
    for tree in row.layout:
        for node in tree.nodes:
            if node.is_leaf:
                path = [tree.nodes[each] for each in node.path] + [node]
                spans = [slice(start + each.start, start + each.start + each.length) for each in path]
                found.append(max(int(row.position_ids[:, 0, span].max()) for span in spans) + 1)
        start += tree.num_tokens
    return torch.tensor(found)


def _most(count: int, synced: bool, device: torch.device) -> int:
    """Of all ranks where they go in step, else of this one."""
    return max_over_ranks(count, device) if synced else count

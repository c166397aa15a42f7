"""Answers from the current policy: every prompt prefilled once, the rows of many prompts decoded together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.attention import PrefillAttention, packed_attention
from tempsamp_fast.model.packing import PackedRow, pack_prompts
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder, next_token_logits
from tempsamp_fast.rollout.kv_cache import SharedPrefixCache
from tempsamp_fast.rollout.token_sampling import SampleNoise, SamplingParams, choose_tokens
from tempsamp_fast.system.ranks import max_over_ranks

RETIRE_SHARE = 1 / 8
"""Finished rows are dropped once they are this share of all: dropping copies the caches of the others."""
GRAPH_RETIRE_SHARE = 1 / 2
"""The same where dropping also takes a new recording."""


@dataclass(frozen=True)
class SampledAnswer:
    """One answer; `ids` end with an end-of-sequence id unless the length limit cut it off."""

    ids: Tensor
    """[completion_len] int64."""
    logps: Tensor
    """[completion_len] float32; of which distribution, `choose_tokens` says."""


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
    cuda_graphs: bool = False,
) -> list[list[SampledAnswer]]:
    """Draw `num_completions` answers to every prompt, or a number of its own to each.

    policy: a `Policy`, or a DeepSpeed engine around one.
    seed: any integers, (seed, step) say. What is drawn depends on them, on the prompt's sample id and mode, and on
        the answer's index: not on the rank, nor on the other prompts.
    banned_token_ids: never drawn; the vision placeholders never are.
    max_tokens_per_row: prompt tokens per prefill pass.
    synced: all ranks make the same number of forward passes, as ZeRO-3 needs it.
    cuda_graphs: replay the decoding passes as CUDA graphs; see `GraphDecoder`.
    Returns the answers by prompt, on the CPU.
    Raises ValueError naming the sample of a prompt that is longer than `max_tokens_per_row`, and FloatingPointError
    naming one at which the logits are not finite.
    """
    if not prompts:
        raise ValueError("prompts is empty")
    counts = [num_completions] * len(prompts) if isinstance(num_completions, int) else list(num_completions)
    with eval_mode(policy):
        config = getattr(policy, "module", policy).config
        logits, positions, attentions = _prefill(policy, prompts, config, max_tokens_per_row, synced)
        _require_finite(prompts, logits.isfinite().all(-1).tolist())
        row_prompts = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(logits.device)
        cache = SharedPrefixCache(attentions, row_prompts)
        logits, positions = logits[row_prompts], positions[row_prompts]
        attentions.clear()

        names = [
            f"{prompt.sample.sample_id} {prompt.mode} {index}"
            for prompt, count in zip(prompts, counts, strict=True)
            for index in range(count)
        ]
        noise = SampleNoise(seed, names).uniforms(params.max_completion_length).to(logits.device)
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        banned[[*banned_token_ids, config.image_token_id, config.video_token_id]] = True
        answers = _Answers(len(names), params.max_completion_length, eos_token_ids, logits.device)
        decode = (GraphDecoder if cuda_graphs else Decoder)(policy, cache)
        retire_share = GRAPH_RETIRE_SHARE if cuda_graphs else RETIRE_SHARE
        for index in range(params.max_completion_length):
            tokens, logps = choose_tokens(logits, params, noise[answers.rows, index], banned)
            answers.append(index, tokens, logps)
            if index + 1 == params.max_completion_length or not _most(answers.unfinished, synced, logits.device):
                break
            keep = answers.retire(retire_share)
            if keep is not None:
                cache.retire(keep)
                tokens, positions = tokens[keep], positions[keep]
            logits = decode(tokens, positions + index)
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


class _Answers:
    """The tokens drawn so far, and which rows still run."""

    def __init__(self, num_rows: int, max_length: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.rows = torch.arange(num_rows, device=device)
        """[R] int64: the rows being decoded."""
        self._ids = torch.zeros(num_rows, max_length, dtype=torch.int64, device=device)
        self._logps = torch.zeros(num_rows, max_length, device=device)
        self._lengths = torch.full((num_rows,), max_length, device=device)
        self._is_finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self._eos = torch.tensor(list(eos_token_ids), device=device)
        self.unfinished = num_rows

    def append(self, index: int, tokens: Tensor, logps: Tensor) -> None:
        """Token `index` of every row being decoded; a finished row's is beyond its length and never read."""
        self._ids[self.rows, index] = tokens
        self._logps[self.rows, index] = logps
        was_finished = self._is_finished[self.rows]
        ends = torch.isin(tokens, self._eos) & ~was_finished
        self._lengths[self.rows] = self._lengths[self.rows].masked_fill(ends, index + 1)
        self._is_finished[self.rows] = was_finished | ends
        self.unfinished = len(was_finished) - int((was_finished | ends).sum())  # the only wait of a token

    def retire(self, share: float) -> Tensor | None:
        """Stop decoding finished rows once they are this share of all; returns the indices into `rows` that stay."""
        num_finished = len(self.rows) - self.unfinished
        if self.unfinished == 0 or num_finished < max(1, share * len(self.rows)):
            return None
        keep = (~self._is_finished[self.rows]).nonzero()[:, 0]
        self.rows = self.rows[keep]
        return keep

    def by_prompt(self, counts: Sequence[int]) -> list[list[SampledAnswer]]:
        ids, logps, lengths = self._ids.cpu(), self._logps.cpu(), self._lengths.tolist()
        answers = iter([SampledAnswer(ids[row, :n].clone(), logps[row, :n].clone()) for row, n in enumerate(lengths)])
        return [list(islice(answers, count)) for count in counts]


def _prefill(
    policy: Any, prompts: Sequence[Prompt], config: Any, max_tokens_per_row: int, synced: bool
) -> tuple[Tensor, Tensor, list[PrefillAttention]]:
    """Logits [P, vocab_size] of each prompt's last token, the positions [P] where its answers start, its keys."""
    parameter = next(policy.parameters())
    rows = pack_prompts(prompts, config=config, max_tokens_per_row=max_tokens_per_row)
    # Agreed upon before the first pass: a pass is a collective of its own under ZeRO-3.
    num_passes = _most(len(rows), synced, parameter.device)
    attentions, logits = [], []
    core = getattr(policy, "module", policy).attention_core
    for row in rows:
        attention = packed_attention(row.layout, dtype=parameter.dtype, device=parameter.device, core=core)
        attentions.append(PrefillAttention(row.layout, attention))
        logits.append(policy(row.to(parameter.device), next_token_logits, attention=attentions[-1]))
    for _ in range(num_passes - len(rows)):
        policy(rows[-1].to(parameter.device), next_token_logits)
    next_positions = torch.cat([_next_positions(row) for row in rows]).to(parameter.device)
    return torch.cat(logits), next_positions, attentions


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

"""What draws answers for the trainer: the policy itself, or another engine that is given its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from tempsamp_fast.batch import Prompt
from tempsamp_fast.config import RolloutConfig, TrainConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.learning.partitioned import forward_of, gathered
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.decoding import Decoder, GraphDecoder
from tempsamp_fast.rollout.generate import SamplingParams, generate
from tempsamp_fast.sample import Task


class RolloutBackend(Protocol):
    """One rank's sampler. To add one, write these two methods and a line in `build_backend`."""

    def sync_weights(self) -> None:
        """Sample from the policy as it is now; called before every batch, cheap when nothing has changed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_completions: int | Sequence[int],
        params: SamplingParams,
        seed: Sequence[int],
    ) -> list[list[SampledAnswer]]:
        """Answers by prompt; arguments and result as of `rollout.generate`."""


def build_backend(engine: Any, chat: Chat, rollout: RolloutConfig, train: TrainConfig, task: Task) -> RolloutBackend:
    """What `rollout.rollout_backend` names."""
    if rollout.rollout_backend == "vllm":
        from tempsamp_fast.rollout.vllm import VllmBackend, colocated_llm

        room = engine.module.config.text_config.max_position_embeddings
        max_tokens = min(room, train.max_tokens_per_row + rollout.max_completion_length)
        llm = colocated_llm(engine.module, chat, max_tokens, rollout.vllm_memory, train.seed)
        return VllmBackend(engine, chat, task, llm)
    return PolicyBackend(
        engine,
        chat.end_token_ids,
        chat.banned_token_ids,
        train.max_tokens_per_row,
        rollout.cuda_graphs,
        rollout.gather_weights != "layer",
    )


class PolicyBackend:
    """Sampling from the training weights themselves: nothing to sync.

    Partitioned parameters (ZeRO-3) are gathered by all ranks together: whole, once for each call of `generate`, or with
    `gathers_once=False` layer by layer in every pass, through the engine and in step with each other.

    cuda_graphs: None is where they can be recorded. They are kept between calls, but for weights that are gathered
    anew for each, which lie elsewhere every time. Raises ValueError for True without CUDA, or with parameters gathered
    in passes: that cannot be recorded.
    """

    def __init__(
        self,
        engine: Any,
        eos_token_ids: Sequence[int],
        banned_token_ids: Sequence[int],
        max_tokens_per_row: int,
        cuda_graphs: bool | None = None,
        gathers_once: bool = True,
    ) -> None:
        self._engine, self._policy = engine, forward_of(engine)
        is_partitioned = self._policy is engine
        self._gathers_once, self._synced = is_partitioned and gathers_once, is_partitioned and not gathers_once
        can_record = torch.cuda.is_available() and not self._synced
        if cuda_graphs and not can_record:
            lacking = "weights gathered once (--gather_weights rollout)" if self._synced else "a CUDA GPU"
            raise ValueError(f"cuda_graphs=True needs {lacking}; set it to False")
        self._options: dict[str, Any] = {
            "eos_token_ids": eos_token_ids,
            "banned_token_ids": banned_token_ids,
            "max_tokens_per_row": max_tokens_per_row,
        }
        self._make_decoder = GraphDecoder if can_record and cuda_graphs is not False else Decoder
        self._decoder = self._make_decoder()

    def sync_weights(self) -> None:
        """The weights are the policy's own."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_completions: int | Sequence[int],
        params: SamplingParams,
        seed: Sequence[int],
    ) -> list[list[SampledAnswer]]:
        """See `rollout.generate`."""
        options = {"seed": seed, "synced": self._synced, **self._options}
        if not self._gathers_once:
            return generate(self._policy, prompts, num_completions, params, decoder=self._decoder, **options)
        with gathered(self._engine) as policy:
            return generate(policy, prompts, num_completions, params, decoder=self._make_decoder(), **options)

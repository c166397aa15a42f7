"""Rollouts by vLLM on this rank's GPU, beside the training weights that are copied into it before every batch.

Written to vLLM's documented interface as of 0.22 (`LLM.generate` on token prompts with embedding inputs,
`LLM.apply_model`, `LLM.reset_prefix_cache`), and run against an in-process double of it only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.generate import SampledAnswer, SamplingParams, eval_mode
from tempsamp_fast.sample import Task

BAN = -100.0
"""Added to the logits of ids that must not be drawn."""


def colocated_llm(checkpoint: str, dtype: torch.dtype, max_tokens: int, gpu_memory_share: float, seed: int) -> Any:
    """A `vllm.LLM` in this process, on this rank's GPU alone.

    max_tokens: of a prompt and its answer. gpu_memory_share: of the whole GPU, for its weights and caches.
    Raises ValueError when vLLM is not installed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            "rollout_backend='vllm' needs the package vllm (pip install 'tempsamp-fast[vllm]'); choose policy"
        ) from error
    return LLM(
        model=checkpoint,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_tokens,
        gpu_memory_utilization=gpu_memory_share,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=1,
        limit_mm_per_prompt={"image": 0, "video": 1},
        enable_mm_embeds=True,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        seed=seed,
    )


class VllmBackend:
    """A `RolloutBackend` over a `vllm.LLM`.

    Videos come as features of the policy's own tower, so that nothing of vLLM's image processing is relied on and no
    cache of it outlives a weight update. vLLM expands the video's placeholder by itself: prompt ids that differ from
    the trainer's are refused. The log-probs of the answers are those after ids are banned and cut by top_k and top_p.

    Raises ValueError for partitioned parameters (ZeRO-3) and for adapters, whose weights are not the checkpoint's.
    """

    def __init__(self, engine: Any, chat: Chat, task: Task, llm: Any) -> None:
        if engine.zero_optimization_partition_weights():
            raise ValueError("rollout_backend='vllm' needs whole parameters, and ZeRO stage 3 partitions them; use 2")
        self._engine = engine
        self._policy: Policy = engine.module
        if self._policy.model is not self._policy.base_model:
            raise ValueError("rollout_backend='vllm' does not take LoRA adapters; choose policy")
        self._chat, self._task, self._llm = chat, task, llm
        self._synced_step: int | None = None

    def sync_weights(self) -> None:
        """Copy the policy's weights into vLLM, unless no optimizer step has changed them."""
        if self._synced_step == self._engine.global_steps:
            return
        weights = [(name, parameter.detach()) for name, parameter in self._policy.base_model.named_parameters()]
        self._llm.apply_model(lambda model: model.load_weights(weights))
        self._llm.reset_prefix_cache()
        self._synced_step = self._engine.global_steps

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        num_completions: int | Sequence[int],
        params: SamplingParams,
        seed: Sequence[int],
    ) -> list[list[SampledAnswer]]:
        """See `rollout.generate`. Raises ValueError naming the sample whose prompt vLLM reads as other ids."""
        counts = [num_completions] * len(prompts) if isinstance(num_completions, int) else num_completions
        with eval_mode(self._policy):
            requests = [self._request(prompt) for prompt in prompts]
        options = [self._sampling(prompt, n, params, seed) for prompt, n in zip(prompts, counts, strict=True)]
        outputs = self._llm.generate(requests, options, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            _require_same_ids(prompt, output.prompt_token_ids)
        return [[_answer(each) for each in output.outputs] for output in outputs]

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        video = prompt.video
        grid = torch.tensor([video.grid_thw])
        device = next(self._policy.parameters()).device
        features = video.features or self._policy.encode_videos(video.pixel_values.to(device), grid.to(device))
        data = {
            "video_embeds": torch.cat([features.embeds, *features.deepstack], dim=1).cpu(),
            "video_grid_thw": grid,
            "second_per_grid_ts": torch.tensor([video.second_per_grid]),
        }
        if self._chat.timestamps_in_text:
            data["timestamps"] = video.timestamps_s[None]
        ids = self._chat.unexpanded(prompt.sample, prompt.mode, self._task)
        return {"prompt_token_ids": ids.tolist(), "multi_modal_data": {"video": data}}

    def _sampling(self, prompt: Prompt, count: int, params: SamplingParams, seed: Sequence[int]) -> Any:
        from vllm import SamplingParams as VllmSamplingParams

        config = self._policy.config
        name = f"{tuple(seed)} {prompt.sample.sample_id} {prompt.mode}"
        banned = (*self._chat.banned_token_ids, config.image_token_id, config.video_token_id)
        return VllmSamplingParams(
            n=count,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_completion_length,
            seed=int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big"),
            stop_token_ids=self._chat.end_token_ids,
            logit_bias=dict.fromkeys(banned, BAN),
            logprobs=0,
            detokenize=False,
        )


def _require_same_ids(prompt: Prompt, ids: Sequence[int]) -> None:
    ours = prompt.input_ids.tolist()
    if list(ids) == ours:
        return
    first = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids)))
    raise ValueError(
        f"sample {prompt.sample.sample_id!r}: vLLM reads its prompt as {len(ids)} ids and the trainer as {len(ours)}, "
        f"different from index {first} on; rollout_backend='vllm' cannot be used with this model and version"
    )


def _answer(output: Any) -> SampledAnswer:
    ids: Tensor = torch.tensor(list(output.token_ids), dtype=torch.int64)
    logps = [by_id[token].logprob for token, by_id in zip(output.token_ids, output.logprobs, strict=True)]
    return SampledAnswer(ids, torch.tensor(logps, dtype=torch.float32))

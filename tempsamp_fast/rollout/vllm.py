"""Rollouts by vLLM on this rank's device, beside the training weights that are copied into it before every batch.

Tested against vLLM 0.30.0 on a CPU (`make test-vllm`); `make test` runs it against a double of what was met there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.batch import Prompt
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.families import family_of, geometry_of
from tempsamp_fast.model.lora import merged_parameters
from tempsamp_fast.model.mrope import temporal_positions
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.answers import SampledAnswer
from tempsamp_fast.rollout.generate import SamplingParams, eval_mode
from tempsamp_fast.sample import Task
from tempsamp_fast.system.files import write_file

logger = logging.getLogger(__name__)
BAN = -100.0
"""Added to the logits of ids that must not be drawn."""
CPU_CACHE_BYTES = 1 << 30
"""Of keys and values where there is no GPU whose memory could be shared out."""


def colocated_llm(policy: Policy, chat: Chat, max_tokens: int, gpu_memory_share: float, seed: int) -> Any:
    """A `vllm.LLM` in this process, on this rank's device alone, for `VllmBackend` to copy the policy's weights into.

    It begins with random ones, and reads no more of the checkpoint than configuration and tokenizer. It is sent
    features of videos: its own vision tower, where it has one, stays random. The number of torch's threads stays as it
    was and can be changed.

    max_tokens: of a prompt and its answer. gpu_memory_share: of the whole GPU, for its weights and caches.
    Raises ValueError when vLLM is not installed.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"rollout_backend='vllm' needs the package vllm (pip install 'tempsamp-fast[vllm]'): {error}; choose policy"
        ) from error
    # vLLM leaves the tower out where no video may come, and with it what reads the features of early layers.
    needs_tower = bool(getattr(policy.config.vision_config, "deepstack_visual_indexes", ()))
    on_cpu: dict[str, Any] = {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    on_cpu["enable_chunked_prefill"] = False  # a seeded answer to a prompt that is read in parts fails there
    num_threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        with TemporaryDirectory(prefix="tempsamp_fast_vllm_") as folder:
            _write_checkpoint(Path(folder), policy, chat)
            return LLM(
                model=folder,
                load_format="dummy",
                dtype=str(policy.base_model.dtype).removeprefix("torch."),
                max_model_len=max_tokens,
                max_num_batched_tokens=max_tokens,
                gpu_memory_utilization=gpu_memory_share,
                distributed_executor_backend="external_launcher",
                tensor_parallel_size=1,
                limit_mm_per_prompt={"image": 0, "video": int(needs_tower)},
                skip_mm_profiling=True,
                enable_mm_embeds=True,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                seed=seed,
                **({} if torch.cuda.is_available() else on_cpu),
            )
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)


def _write_checkpoint(folder: Path, policy: Policy, chat: Chat) -> None:
    """All but the weights. vLLM asks a processor's settings for the size of patches, although it never cuts any."""
    config = copy.deepcopy(policy.config)
    config.architectures = [family_of(config).model_class.__name__]
    config.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    geometry = geometry_of(policy.config)
    sizes = {name: getattr(geometry, name) for name in ("patch_size", "temporal_patch_size", "merge_size")}
    write_file(folder / "preprocessor_config.json", json.dumps(sizes))


class VllmBackend:
    """A `RolloutBackend` over a `vllm.LLM`.

    Videos come as features of the policy's own tower, so that nothing of vLLM's image processing is relied on and no
    cache of it outlives a weight update. vLLM expands the video's placeholder by itself: prompt ids that differ from
    the trainer's are refused. The log-probs of the answers are the model's own at temperature 1, over the whole
    vocabulary, before ids are banned or cut by top_k and top_p. The same seed draws other answers than the policy does.

    Raises ValueError for partitioned parameters (ZeRO-3).
    """

    def __init__(self, engine: Any, chat: Chat, task: Task, llm: Any) -> None:
        if engine.zero_optimization_partition_weights():
            raise ValueError("rollout_backend='vllm' needs whole parameters, and ZeRO stage 3 partitions them; use 2")
        self._engine = engine
        self._policy: Policy = engine.module
        self._chat, self._task, self._llm = chat, task, llm
        self._synced_step: int | None = None

    def sync_weights(self) -> None:
        """Copy the policy's weights into vLLM, adapters merged, unless no optimizer step has changed them."""
        if self._synced_step == self._engine.global_steps:
            return
        weights = merged_parameters(self._policy.base_model)
        language = ((name, weight) for name, weight in weights if not name.startswith("model.visual."))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": language})
        if not torch.cuda.is_available():
            self._llm.apply_model(_repack_head)
        # Reloading empties the worker's half of the encoder cache, and the scheduler would still count on it.
        self._llm.llm_engine.reset_encoder_cache()
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
        features = video.features or self._policy.encode_videos(video.pixel_values.to(device), grid)
        data = {
            "video_embeds": torch.cat([features.embeds, *features.deepstack], dim=1).cpu(),
            "video_grid_thw": grid,
        }
        if self._chat.timestamps_in_text:
            data["timestamps"] = video.timestamps_s[None]
        else:
            seconds = _second_per_grid(prompt, self._policy.config)
            data["second_per_grid_ts"] = torch.tensor([seconds], dtype=torch.float64)
        ids = self._chat.unexpanded(prompt.sample, prompt.mode, self._task)
        names = {"video": [_name(data)]}
        return {"prompt_token_ids": ids.tolist(), "multi_modal_data": {"video": data}, "multi_modal_uuids": names}

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


def _name(video: dict[str, Tensor]) -> str:
    """What vLLM's caches know a video by. Its own name would leave the times out, and still frames look alike."""
    digest = hashlib.blake2b(digest_size=16)
    for part in video.values():
        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _repack_head(model: Any) -> None:
    """On a CPU a layer multiplies by a copy of its weight; that of a head tied to the embeddings is not made anew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _second_per_grid(prompt: Prompt, config: Any) -> float:
    """Seconds between temporal patches from which vLLM gets the positions of the trainer.

    Both round the product down, the trainer's in float32 and vLLM's in float64: where it is nearly whole they may
    differ by one. The middle of what gives the trainer's is far from either. Of long videos at odd frame rates (one in
    200 of 384 patches) nothing gives all of them, which is told.
    """
    num_patches, rate = prompt.video.grid_thw[0], config.vision_config.tokens_per_second
    if num_patches == 1:
        return prompt.video.second_per_grid
    positions = temporal_positions(num_patches, prompt.video.second_per_grid, config)[1:].double()
    tokens_per_s = rate * torch.arange(1, num_patches).double()
    seconds = float((positions / tokens_per_s).max() + ((positions + 1) / tokens_per_s).min()) / 2
    num_other = int(((tokens_per_s * seconds).floor() != positions).sum())
    if num_other:
        logger.warning(
            "sample %r: vLLM takes %d of its %d temporal patches to lie one position off",
            prompt.sample.sample_id[:80], num_other, num_patches,
        )  # fmt: skip
    return seconds


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

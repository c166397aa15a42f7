"""An in-process double of the part of vLLM (0.22) that the trainer uses: same names, same shapes, a transformers model.

Like vLLM it expands a video's placeholder by itself, keeps what it computed for a prompt until its prefix cache is
reset, and knows no keyword that is not documented.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tempsamp_fast.batch import Prompt, Sample, VideoPatches, VisionFeatures
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout import generate as rollout


@dataclass(frozen=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    detokenize: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int,
        gpu_memory_utilization: float,
        distributed_executor_backend: str,
        tensor_parallel_size: int,
        limit_mm_per_prompt: dict[str, int],
        enable_mm_embeds: bool,
        enable_prefix_caching: bool,
        logprobs_mode: str,
        seed: int,
    ) -> None:
        assert enable_mm_embeds and limit_mm_per_prompt["video"] == 1 and dtype == "float32"
        self.policy = Policy(AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)).eval()
        has_tokenizer = (Path(model) / "tokenizer.json").exists()
        self.tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer else None
        self.requests: list[SamplingParams] = []
        self.extra_ids: list[int] = []
        """Put in front of every prompt, as a processor that disagrees would."""
        self._prefix_cache: dict[tuple[Any, ...], SimpleNamespace] = {}

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        own = dict(self.policy.base_model.named_parameters())
        loaded = {name: own[name].data.copy_(tensor) for name, tensor in weights}
        assert loaded.keys() == own.keys()

    def reset_prefix_cache(self) -> bool:
        self._prefix_cache.clear()
        return True

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.requests += sampling_params
        return [self._one(prompt, options) for prompt, options in zip(prompts, sampling_params, strict=True)]

    def _one(self, request: dict[str, Any], options: SamplingParams) -> SimpleNamespace:
        key = (*request["prompt_token_ids"], options.n, options.seed, options.temperature)
        if key not in self._prefix_cache:
            self._prefix_cache[key] = self._computed(request, options)
        return self._prefix_cache[key]

    def _computed(self, request: dict[str, Any], options: SamplingParams) -> SimpleNamespace:
        data = request["multi_modal_data"]["video"]
        ids = self.extra_ids + self._expanded(request["prompt_token_ids"], data)
        size = self.policy.config.text_config.hidden_size
        embeds, *deepstack = data["video_embeds"].split(size, dim=1)
        (grid,), (second,) = data["video_grid_thw"].tolist(), data["second_per_grid_ts"].tolist()
        video = VideoPatches(
            torch.empty(0, 0), tuple(grid), second, torch.empty(0), VisionFeatures(embeds, tuple(deepstack))
        )
        prompt = Prompt(Sample("", Path(), "", 0.0, ()), "answer", torch.tensor(ids), video)
        params = rollout.SamplingParams(options.temperature, options.top_p, options.top_k, options.max_tokens)
        ((answers),) = rollout.generate(
            self.policy, [prompt], options.n, params, seed=(options.seed or 0,),
            eos_token_ids=options.stop_token_ids,
            banned_token_ids=[token for token, bias in options.logit_bias.items() if bias == -100],
        )  # fmt: skip
        outputs = [
            SimpleNamespace(
                token_ids=answer.ids.tolist(),
                logprobs=[
                    {token: SimpleNamespace(logprob=logp)}
                    for token, logp in zip(answer.ids.tolist(), answer.logps.tolist(), strict=True)
                ],
            )
            for answer in answers
        ]
        return SimpleNamespace(prompt_token_ids=ids, outputs=outputs)

    def _expanded(self, ids: list[int], data: dict[str, Tensor]) -> list[int]:
        config = self.policy.config
        start, pad, end = config.vision_start_token_id, config.video_token_id, config.vision_end_token_id
        at = ids.index(pad)
        assert ids[at - 1 : at + 2] == [start, pad, end] and ids.count(pad) == 1
        num_frames, height, width = data["video_grid_thw"][0].tolist()
        frame = [pad] * (height * width // config.vision_config.spatial_merge_size**2)
        if "timestamps" not in data:
            return [*ids[:at], *frame * num_frames, *ids[at + 1 :]]
        frames = [[*self._timestamp(t), start, *frame, end] for t in data["timestamps"][0].tolist()]
        return [*ids[: at - 1], *(token for each in frames for token in each), *ids[at + 2 :]]

    def _timestamp(self, seconds: float) -> list[int]:
        if self.tokenizer is None:
            return [int(seconds)]
        return self.tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False).input_ids


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find this double."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)

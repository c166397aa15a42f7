"""An in-process double of the part of vLLM (0.30) that the trainer uses: same names, same shapes, a transformers model.

It does what a real engine on a CPU was seen to do (`make test-vllm`): it asks for the settings of an image processor
and for room for its cache, takes torch's threads, expands a video's placeholder and nothing around it, takes weights by
`reload_weights` alone and then forgets one half of its encoder cache, multiplies by a copy of a tied head, keeps what
it computed for a prompt until its prefix cache is reset, and knows no keyword that is not documented.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup, Sample, VideoPatches, VisionFeatures
from tempsamp_fast.model.packing import pack
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


class ParallelLMHead(nn.Module):
    """The head of `model`, which multiplies by the copy of its weight that was last made."""

    def __init__(self, model: Any, is_tied: bool) -> None:
        super().__init__()
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda head: head.pack())
        self._model, self._is_tied = [model], is_tied

    def pack(self) -> None:
        (model,) = self._model
        if self._is_tied:
            model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())


class EngineModel(nn.Module):
    """What `LLM.apply_model` hands out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.head = ParallelLMHead(model, model.config.tie_word_embeddings)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise AttributeError("'Parameter' object has no attribute 'weight_loader'")


class LLM:
    def __init__(
        self,
        model: str,
        *,
        load_format: str,
        dtype: str,
        max_model_len: int,
        max_num_batched_tokens: int,
        gpu_memory_utilization: float,
        distributed_executor_backend: str,
        tensor_parallel_size: int,
        limit_mm_per_prompt: dict[str, int],
        skip_mm_profiling: bool,
        enable_mm_embeds: bool,
        enable_prefix_caching: bool,
        logprobs_mode: str,
        seed: int,
        enforce_eager: bool = False,
        enable_chunked_prefill: bool = True,
        kv_cache_memory_bytes: int | None = None,
    ) -> None:
        assert enable_mm_embeds and load_format == "dummy" and dtype == "float32"
        if not (Path(model) / "preprocessor_config.json").is_file():
            raise OSError(f"Can't load image processor for {model!r}: it has no preprocessor_config.json")
        if kv_cache_memory_bytes is None and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            raise ValueError("Available memory on node 0 on startup is less than desired CPU memory utilization")
        config = AutoConfig.from_pretrained(model)
        if not config.architectures:
            raise ValueError("Model architectures are not supported for now")
        torch.set_num_threads(1)
        torch.set_num_threads = lambda number: None
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            self.policy = Policy(AutoModelForImageTextToText.from_config(config, dtype=torch.float32)).eval()
        if limit_mm_per_prompt["video"] == 0:
            del self.policy.base_model.model.visual
        self.model = EngineModel(self.policy.base_model)
        self.model.head.pack()
        has_tokenizer = (Path(model) / "tokenizer.json").exists()
        self.tokenizer = AutoTokenizer.from_pretrained(model) if has_tokenizer else None
        self.logprobs_mode = logprobs_mode
        self.most_chunked_tokens = max_num_batched_tokens if enable_chunked_prefill else None
        self.requests: list[SamplingParams] = []
        self.extra_ids: list[int] = []
        """Put in front of every prompt, as a processor that disagrees would."""
        self.llm_engine = SimpleNamespace(reset_encoder_cache=self._reset_encoder_cache)
        self._prefix_cache: dict[tuple[Any, ...], SimpleNamespace] = {}
        self._processed: dict[str, dict[str, Tensor]] = {}
        """What was sent of a video, by its name: by default of its features alone, whatever its times are."""
        self._scheduled: set[str] = set()
        self._encoded: dict[str, Tensor] = {}
        """The two halves of the encoder cache: what the scheduler counts on, and what the worker has."""

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[None]:
        assert method == "reload_weights"
        own = dict(self.policy.base_model.named_parameters())
        if self.model.head._is_tied:
            del own["lm_head.weight"]
        loaded = {name: own[name].data.copy_(tensor) for name, tensor in kwargs["weights_iterator"]}
        assert loaded.keys() == {name for name in own if not name.startswith("model.visual.")}
        self._encoded.clear()
        return [None]

    def _reset_encoder_cache(self) -> None:
        self._scheduled.clear()
        self._encoded.clear()

    def reset_prefix_cache(self) -> bool:
        self._prefix_cache.clear()
        return True

    def generate(self, prompts: list[dict], sampling_params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        self.requests += sampling_params
        outputs = [self._one(prompt, options) for prompt, options in zip(prompts, sampling_params, strict=True)]
        if self.most_chunked_tokens and sum(len(each.prompt_token_ids) for each in outputs) > self.most_chunked_tokens:
            raise RuntimeError("CPU Generator does not use offset")
        return outputs

    def _one(self, request: dict[str, Any], options: SamplingParams) -> SimpleNamespace:
        video = request["multi_modal_data"]["video"]
        (name,) = request.get("multi_modal_uuids", {}).get("video") or [
            str(hash(video["video_embeds"].numpy().tobytes()))
        ]
        video = self._processed.setdefault(name, video)
        if name not in self._scheduled:
            self._scheduled.add(name)
            self._encoded[name] = video["video_embeds"]
        key = (*request["prompt_token_ids"], name, options.n, options.seed, options.temperature)
        if key not in self._prefix_cache:
            if name not in self._encoded:
                raise RuntimeError(f"Encoder cache miss for {name}.")
            self._prefix_cache[key] = self._computed(request["prompt_token_ids"], video, options, self._encoded[name])
        return self._prefix_cache[key]

    def _computed(
        self, prompt_ids: list[int], data: dict[str, Tensor], options: SamplingParams, features: Tensor
    ) -> SimpleNamespace:
        ids = self.extra_ids + self._expanded(prompt_ids, data)
        size = self.policy.config.text_config.hidden_size
        embeds, *deepstack = features.split(size, dim=1)
        ((grid,), (second,)) = data["video_grid_thw"].tolist(), data.get("second_per_grid_ts", torch.ones(1)).tolist()
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
        logps = self._logps(prompt, [answer.ids for answer in answers], options)
        outputs = [
            SimpleNamespace(
                token_ids=answer.ids.tolist(),
                logprobs=[
                    {token: SimpleNamespace(logprob=logp)}
                    for token, logp in zip(answer.ids.tolist(), own.tolist(), strict=True)
                ],
            )
            for answer, own in zip(answers, logps, strict=True)
        ]
        return SimpleNamespace(prompt_token_ids=ids, outputs=outputs)

    @torch.no_grad()
    def _logps(self, prompt: Prompt, answers: list[Tensor], options: SamplingParams) -> list[Tensor]:
        """Of the logits as they are, or of what temperature and biases make of them."""
        group = RolloutGroup(prompt, [Completion(ids, "") for ids in answers])
        (row,) = pack([group], config=self.policy.config, max_tokens_per_row=100_000)
        logits = self.policy(row, lambda hidden, weight: hidden @ weight.T)
        if self.logprobs_mode == "processed_logprobs":
            logits = logits / (options.temperature or 1.0)
            for token, bias in options.logit_bias.items():
                logits[:, token] += bias
        logps = logits.log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
        return list(logps.split([len(ids) for ids in answers]))

    def _expanded(self, ids: list[int], data: dict[str, Tensor]) -> list[int]:
        config = self.policy.config
        start, pad, end = config.vision_start_token_id, config.video_token_id, config.vision_end_token_id
        at = ids.index(pad)
        assert ids.count(pad) == 1
        num_frames, height, width = data["video_grid_thw"][0].tolist()
        frame = [pad] * (height * width // config.vision_config.spatial_merge_size**2)
        if "timestamps" in data:
            frames = [[*self._timestamp(t), start, *frame, end] for t in data["timestamps"][0].tolist()]
        else:
            frames = [frame] * num_frames
        return [*ids[:at], *(token for each in frames for token in each), *ids[at + 1 :]]

    def _timestamp(self, seconds: float) -> list[int]:
        if self.tokenizer is None:
            return [int(seconds)]
        return self.tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False).input_ids


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find this double."""
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)  # put back what the double takes away
    heads = "vllm.model_executor.layers.vocab_parallel_embedding"
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers", heads):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm"].LLM, sys.modules["vllm"].SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    sys.modules[heads].ParallelLMHead = ParallelLMHead  # type: ignore[attr-defined]

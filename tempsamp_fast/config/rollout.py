"""How answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tempsamp_fast.config.setting import require, require_types, setting


@dataclass
class RolloutConfig:
    """How answers are sampled."""

    num_generations: int = setting(
        4, "answers per prompt, the off-policy one included", unit="answers", source="paper: 4, and 8 on Charades-STA"
    )
    temperature: float = setting(1.0, "divides the logits, in sampling and in the loss", source="paper: 1")
    top_p: float = setting(
        1.0, "draw from the smallest set of tokens of this probability; 1: off", source="paper: 1; its release: .85"
    )
    top_k: int = setting(0, "draw from so many of the likeliest tokens; 0: off", unit="tokens")
    max_completion_length: int = setting(
        256, "most tokens of an answer", unit="tokens", source="paper: 2048; its release: 256"
    )
    rollout_backend: Literal["policy", "vllm"] = setting(
        "policy", "what samples: the training weights themselves, or vLLM on the same GPU"
    )
    vllm_memory: float = setting(0.3, "share of the GPU's memory that vLLM takes")
    max_logp_gap: float = setting(
        0.2,
        "end the run where the sampler's log-probs are further than this from the policy's on average; 0: never",
        unit="nat",
    )
    cuda_graphs: bool | None = setting(
        None, "replay decoding passes as CUDA graphs; unset: on a GPU, unless weights are gathered layer by layer"
    )
    gather_weights: Literal["auto", "rollout", "layer"] = setting(
        "auto",
        "of the policy under zero_stage 3: all weights whole on every GPU while a rollout draws, or layer by layer in "
        "every pass; auto: whole where the plan fits them",
    )
    record_rollouts: str | None = setting(None, "write every sampled answer to this JSONL file")
    replay_rollouts: str | None = setting(None, "take the answers from a recorded file")

    def __post_init__(self) -> None:
        require_types(self)
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
        require(self.temperature > 0, "temperature", self.temperature, "positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "zero (off) or more")
        require(self.max_completion_length >= 1, "max_completion_length", self.max_completion_length, "at least 1")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "in (0, 1)")
        require(self.max_logp_gap >= 0, "max_logp_gap", self.max_logp_gap, "0 (no limit) or more")
        require(
            self.record_rollouts is None or self.replay_rollouts is None,
            "record_rollouts", self.record_rollouts, "unset when replay_rollouts is given",
        )  # fmt: skip
        require(
            not self.cuda_graphs or self.rollout_backend == "policy",
            "cuda_graphs", self.cuda_graphs, f"False with rollout_backend={self.rollout_backend!r}",
        )  # fmt: skip

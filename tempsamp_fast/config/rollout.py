"""How answers are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tempsamp_fast.config.ranges import require


@dataclass
class RolloutConfig:
    """How answers are sampled."""

    num_generations: int = field(default=4, metadata={"help": "answers per prompt, the off-policy one included"})
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = field(default=0, metadata={"help": "0: off"})
    max_completion_length: int = 256
    rollout_backend: Literal["policy", "vllm"] = field(
        default="policy", metadata={"help": "what samples: the training weights themselves, or vLLM on the same GPU"}
    )
    vllm_memory: float = field(default=0.3, metadata={"help": "share of the GPU's memory that vLLM takes"})
    cuda_graphs: bool = field(default=False, metadata={"help": "replay decoding passes as CUDA graphs"})
    record_rollouts: str | None = field(
        default=None, metadata={"help": "write every sampled answer to this JSONL file"}
    )
    replay_rollouts: str | None = field(default=None, metadata={"help": "take the answers from a recorded file"})

    def __post_init__(self) -> None:
        require(self.num_generations >= 2, "num_generations", self.num_generations, "at least 2")
        require(self.temperature > 0, "temperature", self.temperature, "positive")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "zero (off) or more")
        require(self.max_completion_length >= 1, "max_completion_length", self.max_completion_length, "at least 1")
        require(0 < self.vllm_memory < 1, "vllm_memory", self.vllm_memory, "in (0, 1)")
        require(
            self.record_rollouts is None or self.replay_rollouts is None,
            "record_rollouts", self.record_rollouts, "unset when replay_rollouts is given",
        )  # fmt: skip
        require(
            not self.cuda_graphs or self.rollout_backend == "policy",
            "cuda_graphs", self.cuda_graphs, f"False with rollout_backend={self.rollout_backend!r}",
        )  # fmt: skip

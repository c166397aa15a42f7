"""Which model learns, and what of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tempsamp_fast.config.ranges import require

LigerLayers = Literal["auto", "on", "off"]
AttentionCore = Literal["auto", "split", "varlen", "flex"]


@dataclass
class ModelConfig:
    """Which model learns, and what of it."""

    model: str = field(
        default="tiny", metadata={"help": "checkpoint folder, hub name, or 'tiny' for the embedded model"}
    )
    tiny_family: str = field(default="qwen2_5_vl", metadata={"help": "of the embedded model: qwen2_5_vl or qwen3_vl"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    freeze_vision: bool = False
    lora_rank: int = field(
        default=0, metadata={"help": "train adapters of this rank on the language model; 0: all weights"}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "scale of the adapters; None: twice the rank"})
    lora_targets: str = field(
        default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        metadata={"help": "linear layers of the language model that get adapters"},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass instead of keeping them"}
    )
    checkpoint_every: int = field(default=1, metadata={"help": "of the decoder layers, recompute every k-th"})
    checkpoint_vision: bool = field(default=True, metadata={"help": "recompute the vision tower's blocks too"})
    attention_core: AttentionCore = field(
        default="auto",
        metadata={"help": "how packed rows attend: auto is one varlen flash call on a GPU, split SDPA calls elsewhere"},
    )
    liger_layers: LigerLayers = field(
        default="auto", metadata={"help": "Liger's fused RMSNorm, SwiGLU and rotary positions; auto: on with a GPU"}
    )
    trust_remote_code: bool = False
    allow_pickle: bool = field(
        default=False, metadata={"help": "also load weights and state from pickles, which can run any code"}
    )

    def __post_init__(self) -> None:
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "zero (off) or more")
        require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "positive")

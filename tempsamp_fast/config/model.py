"""Which model learns, and what of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tempsamp_fast.config.setting import require, require_types, setting

LigerLayers = Literal["auto", "on", "off"]
AttentionCore = Literal["auto", "split", "varlen", "flex"]


@dataclass
class ModelConfig:
    """Which model learns, and what of it."""

    model: str = setting(
        "tiny",
        "folder of a run (RUN/best: of its best evaluation) or checkpoint, hub name, or 'tiny' for the embedded one",
    )
    tiny_family: str = setting("qwen2_5_vl", "family of the embedded model: a record of model/families.py, by its name")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU")
    freeze_vision: bool = setting(False, "train the language model alone; each video is then encoded once a step")
    lora_rank: int = setting(0, "train adapters of this rank on the language model; 0: all weights", unit="rows")
    lora_alpha: float | None = setting(None, "scale of the adapters; None: twice the rank")
    lora_targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "linear layers of the language model that get adapters",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass instead of keeping them")
    checkpoint_every: int = setting(1, "of the decoder layers, recompute every k-th", unit="layers")
    checkpoint_vision: bool = setting(True, "recompute the vision tower's blocks too")
    attention_core: AttentionCore = setting(
        "auto", "how packed rows attend: auto is one varlen flash call on a GPU, split SDPA calls elsewhere"
    )
    liger_layers: LigerLayers = setting(
        "auto",
        "fused layers: Liger's RMSNorm, SwiGLU and rotary positions, and those of the tower; auto: on with a GPU",
    )
    offline: bool = setting(
        False, "take nothing from the hub but what its cache has; always so for a model that only a record names"
    )
    trust_remote_code: bool = setting(False, "let a checkpoint bring Python code of its own, which then runs here")
    allow_pickle: bool = setting(False, "also load weights and state from pickles, which can run any code")

    def __post_init__(self) -> None:
        require_types(self)
        require(self.checkpoint_every >= 1, "checkpoint_every", self.checkpoint_every, "at least 1")
        require(self.lora_rank >= 0, "lora_rank", self.lora_rank, "zero (off) or more")
        require(self.lora_alpha is None or self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "positive")

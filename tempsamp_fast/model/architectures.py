"""What a checkpoint is made of, without its weights: its configuration and its parameters counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.embedded.model import tiny_config

# hidden, intermediate, layers, heads, kv heads, vocabulary, whether the embedding is the head too
QWEN2_5_VL = {
    "Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}
# the same, then of the vision tower: hidden, intermediate, depth, layers handed on by deepstack
QWEN3_VL = {
    "Qwen3-VL-2B-Instruct": (2048, 6144, 28, 16, 8, 151936, True, 1024, 4096, 24, (5, 11, 17)),
    "Qwen3-VL-4B-Instruct": (2560, 9728, 36, 32, 8, 151936, True, 1024, 4096, 24, (5, 11, 17)),
    "Qwen3-VL-8B-Instruct": (4096, 12288, 36, 32, 8, 151936, False, 1152, 4304, 27, (8, 16, 24)),
}
"""As published with the checkpoints, for machines without a network."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of a model."""

    total: int
    vision: int
    head: int
    """Of the output embedding."""
    adapters: int
    """Of LoRA adapters, on top of the total; 0 without."""

    def trained(self, model: ModelConfig) -> int:
        """What the optimizer sees."""
        if model.lora_rank:
            return self.adapters
        return self.total - (self.vision if model.freeze_vision else 0)


def model_config(model: ModelConfig) -> Any:
    """The transformers configuration of a folder, a hub name, or the embedded model; no weights are read.

    Hub names known here are not looked up. Raises ValueError for a model that is found nowhere.
    """
    if model.model == "tiny":
        return tiny_config(1024, lambda token: 0, model.tiny_family)
    name = model.model.rpartition("/")[2]
    if not Path(model.model).exists() and name in QWEN2_5_VL:
        return _qwen2_5_vl(*QWEN2_5_VL[name])
    if not Path(model.model).exists() and name in QWEN3_VL:
        return _qwen3_vl(*QWEN3_VL[name])
    try:
        return AutoConfig.from_pretrained(model.model, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        known = ", ".join([*QWEN2_5_VL, *QWEN3_VL])
        raise ValueError(f"model={model.model!r}: its config.json is not here; known without it are {known}") from error


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}


def _qwen2_5_vl(*shape: Any) -> Any:
    *text, tied = shape
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": text[0]}
    vision["fullatt_block_indexes"] = [7, 15, 23, 31]
    return Qwen2_5_VLConfig(text_config=_text(*text), vision_config=vision, tie_word_embeddings=tied)


def _qwen3_vl(*shape: Any) -> Any:
    *text, tied, hidden, intermediate, depth, deepstack = shape
    vision = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": 16}
    vision |= {"out_hidden_size": text[0], "deepstack_visual_indexes": list(deepstack), "num_position_embeddings": 2304}
    return Qwen3VLConfig(text_config=_text(*text) | {"head_dim": 128}, vision_config=vision, tie_word_embeddings=tied)


def count_parameters(config: Any, model: ModelConfig) -> Parameters:
    """Counted on a model without storage; tied weights once."""
    return _count(config.to_json_string(), model.lora_rank, model.lora_targets)


@lru_cache(maxsize=8)
def _count(config_json: str, lora_rank: int, lora_targets: str) -> Parameters:
    config = AutoConfig.for_model(**json.loads(config_json))
    with torch.device("meta"):
        built: Any = AutoModelForImageTextToText.from_config(config)
    targets = tuple(target.strip() for target in lora_targets.split(","))
    adapters = sum(
        lora_rank * (module.in_features + module.out_features)
        for name, module in built.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(targets)
    )
    return Parameters(
        total=sum(parameter.numel() for parameter in built.parameters()),
        vision=sum(parameter.numel() for parameter in built.model.visual.parameters()),
        head=built.lm_head.weight.numel(),
        adapters=adapters,
    )

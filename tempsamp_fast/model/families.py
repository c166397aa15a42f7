"""What distinguishes the model families: one record each. To add a family, write its record and name it in `FAMILIES`.

Everything else asks `family_of` a model's configuration. Where a family needs layers of its own, the record names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tempsamp_fast.video import Geometry


@dataclass(frozen=True)
class Kept:
    """Numbers of elements that autograd keeps of transformers' layers in eager mode, counted on its saved tensors."""

    per_token: tuple[int, int, int, int]
    """Per token and decoder layer: of the hidden size, query size, key size, intermediate size."""
    per_patch: tuple[int, int]
    """Per patch and vision block: of the tower's hidden size, intermediate size."""


@dataclass(frozen=True)
class Family:
    """The facts of one model family."""

    name: str
    """Its `model_type`."""
    config_class: Any
    """Of transformers, a subclass of `PretrainedConfig`."""
    model_class: type[PreTrainedModel]
    has_timestamps: bool
    """Every temporal patch is written after its time, as text, and its positions are a block of their own (technical
    report of Qwen3-VL, section 2). Else a video is one run of placeholders whose positions follow the clock (that of
    Qwen2.5-VL, section 2.1.3)."""
    geometry: Geometry
    """The published limits of frames; the sizes of patches are those of a model's configuration."""
    kept: Mapping[int, Kept]
    """By bytes per value."""
    published: Mapping[str, Mapping[str, Any]]
    """Configurations as published with the checkpoints, by name, for machines without a network."""
    tiny: Mapping[str, Any]
    """The configuration of the embedded model, over what the embedded models have in common."""
    vision_mlp_products: int
    """Matrices in the MLP of a vision block: 3 where it is gated."""
    text_tokens_per_frame: int = 0
    """Written around the placeholders of every temporal patch."""
    layer_types: frozenset[str] = frozenset({"full_attention"})
    """Decoder layers that packed rows support."""
    norm_offset: float = 0.0
    """Added to the weights of RMSNorm before they scale."""

    def published_config(self, name: str) -> PretrainedConfig:
        """The configuration of a published checkpoint. Raises KeyError for one that is not known here."""
        return self.config_class(**self.published[name])


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}


def _qwen2_5_vl(*text: int, tied: bool) -> dict[str, Any]:
    vision: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"out_hidden_size": text[0], "fullatt_block_indexes": [7, 15, 23, 31]}
    return {"text_config": _text(*text), "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3_vl(*text: int, tied: bool, tower: tuple[int, int, int], deepstack: list[int]) -> dict[str, Any]:
    """tower: its hidden size, intermediate size and depth. deepstack: blocks whose features early layers get."""
    hidden, intermediate, depth = tower
    vision: dict[str, Any] = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": 16}
    vision |= {"out_hidden_size": text[0], "deepstack_visual_indexes": deepstack, "num_position_embeddings": 2304}
    return {"text_config": _text(*text) | {"head_dim": 128}, "vision_config": vision, "tie_word_embeddings": tied}


TINY_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    config_class=Qwen2_5_VLConfig,
    model_class=Qwen2_5_VLForConditionalGeneration,
    has_timestamps=False,
    geometry=Geometry.of_family("qwen2_5_vl"),
    kept={4: Kept((6, 3, 4, 4), (11, 4)), 2: Kept((8, 3, 4, 4), (13, 4))},
    published={
        "Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
        "Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    },
    tiny={
        "text_config": {"rope_parameters": TINY_ROPE},
        "vision_config": {"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
    },
    vision_mlp_products=3,
)
SMALL_TOWER: dict[str, Any] = {"tower": (1024, 4096, 24), "deepstack": [5, 11, 17]}
QWEN3_VL = Family(
    name="qwen3_vl",
    config_class=Qwen3VLConfig,
    model_class=Qwen3VLForConditionalGeneration,
    has_timestamps=True,
    geometry=Geometry.of_family("qwen3_vl"),
    kept={4: Kept((6, 5, 6, 4), (10, 2)), 2: Kept((8, 6, 7, 4), (10, 2))},
    published={
        "Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16, 8, 151936, tied=True, **SMALL_TOWER),
        "Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32, 8, 151936, tied=True, **SMALL_TOWER),
        "Qwen3-VL-8B-Instruct": _qwen3_vl(
            4096, 12288, 36, 32, 8, 151936, tied=False, tower=(1152, 4304, 27), deepstack=[8, 16, 24]
        ),
    },
    tiny={
        "text_config": {"head_dim": 32, "rope_parameters": TINY_ROPE | {"mrope_interleaved": True}},
        "vision_config": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    },
    vision_mlp_products=2,
    text_tokens_per_frame=10,
)
FAMILIES = {family.name: family for family in (QWEN2_5_VL, QWEN3_VL)}


def family_named(name: str, setting: str = "family") -> Family:
    """The record of a family. Raises ValueError that names the setting, the value and the choices."""
    if name not in FAMILIES:
        raise ValueError(f"{setting}={name!r}: choose from {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(model_config: Any) -> Family:
    """The family of a transformers configuration. Raises ValueError for a type that is not supported."""
    name = model_config.model_type
    if name not in FAMILIES:
        raise ValueError(f"model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def geometry_of(
    model_config: Any,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: int | None = None,
) -> Geometry:
    """How a model wants its frames resized and cut: patch sizes from its configuration, None takes the family's limit.

    Raises ValueError for a type that is not supported, and naming a limit that is out of range.
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    vision = model_config.vision_config
    sizes: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    return dataclasses.replace(family_of(model_config).geometry, **sizes, **given)

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
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tempsamp_fast.config.setting import choose_from
from tempsamp_fast.video import Geometry


@dataclass(frozen=True)
class Kept:
    """Numbers of elements that autograd keeps of transformers' layers in eager mode, counted on its saved tensors."""

    per_token: tuple[int, int, int, int]
    """Per token and decoder layer that attends: of the hidden size, query size, key size, intermediate size."""
    per_patch: tuple[int, int]
    """Per patch and vision block: of the tower's hidden size, intermediate size."""
    per_linear_token: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Per token and linear layer: of the hidden size, channels of the convolution, value size, intermediate size.

    In heads of 128; of `kept` by torch's operations, of `kept_fused` by the kernels for GPUs.
    """
    per_gathered_key: int = 0
    """Of the key size, per key that one flash call is given: a prompt's keys come again with each of its answers."""


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
    norm_casting: str = "llama"
    """Liger's name for where RMSNorm leaves float32: before its weights scale ("llama"), or after ("gemma")."""
    kept_fused: Kept | None = None
    """Of bfloat16 with the kernels of a GPU: Liger's layers, one flash call per layer, flash-linear-attention's linear
    layers. None: not counted, as in `kept`."""
    wide_parameters: tuple[str, ...] = ()
    """What stays in float32 where all others are bfloat16."""
    has_output_gate: bool = False
    """What attention gives is scaled by a sigmoid, whose inputs are as wide as the queries."""

    def published_config(self, name: str) -> PretrainedConfig:
        """The configuration of a published checkpoint. Raises KeyError for one that is not known here."""
        return self.config_class(**self.published[name])


Tower = tuple[int, int, int, int]
"""Of a vision tower: hidden size, intermediate size, depth, heads."""
SMALL_TOWER, LARGE_TOWER = (1024, 4096, 24, 16), (1152, 4304, 27, 16)


def _text(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}


def _qwen2_5_vl(*text: int, tied: bool) -> dict[str, Any]:
    vision: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"out_hidden_size": text[0], "fullatt_block_indexes": [7, 15, 23, 31]}
    return {"text_config": _text(*text), "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3_vl(*text: int, tied: bool, tower: Tower, deepstack: list[int], **experts: int) -> dict[str, Any]:
    """deepstack: blocks whose features early layers get."""
    vision = _vision(tower, text[0]) | {"deepstack_visual_indexes": deepstack}
    sizes = _text(*text) | {"head_dim": 128} | experts
    return {"text_config": sizes, "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3_5(*text: int, tied: bool, tower: Tower, value_heads: int, **experts: int) -> dict[str, Any]:
    """value_heads: of the linear layers."""
    sizes = _text(*(*text, 248320)) | {"head_dim": 256, "linear_num_value_heads": value_heads} | experts
    return {"text_config": sizes, "vision_config": _vision(tower, text[0]), "tie_word_embeddings": tied}


def _vision(tower: Tower, out_hidden: int) -> dict[str, Any]:
    hidden, intermediate, depth, heads = tower
    vision = {"depth": depth, "hidden_size": hidden, "intermediate_size": intermediate, "num_heads": heads}
    return vision | {"out_hidden_size": out_hidden, "num_position_embeddings": 2304}


TINY_EXPERTS = {"moe_intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2}
TINY_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]}
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    config_class=Qwen2_5_VLConfig,
    model_class=Qwen2_5_VLForConditionalGeneration,
    has_timestamps=False,
    geometry=Geometry.of_family("qwen2_5_vl"),
    kept={4: Kept((6, 3, 4, 4), (11, 4)), 2: Kept((8, 3, 4, 4), (13, 4))},
    kept_fused=Kept((4, 2, 0, 3), (8, 3), per_gathered_key=2),
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
EARLY: dict[str, Any] = {"tower": SMALL_TOWER, "deepstack": [5, 11, 17]}
QWEN3_VL = Family(
    name="qwen3_vl",
    config_class=Qwen3VLConfig,
    model_class=Qwen3VLForConditionalGeneration,
    has_timestamps=True,
    geometry=Geometry.of_family("qwen3_vl"),
    kept={4: Kept((6, 5, 6, 4), (10, 2)), 2: Kept((8, 6, 7, 4), (10, 2))},
    kept_fused=Kept((4, 3, 1, 3), (8, 2), per_gathered_key=2),
    published={
        "Qwen3-VL-2B-Instruct": _qwen3_vl(2048, 6144, 28, 16, 8, 151936, tied=True, **EARLY),
        "Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, 36, 32, 8, 151936, tied=True, **EARLY),
        "Qwen3-VL-8B-Instruct": _qwen3_vl(
            4096, 12288, 36, 32, 8, 151936, tied=False, tower=LARGE_TOWER, deepstack=[8, 16, 24]
        ),
    },
    tiny={
        "text_config": {"head_dim": 32, "rope_parameters": TINY_ROPE | {"mrope_interleaved": True}},
        "vision_config": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    },
    vision_mlp_products=2,
    text_tokens_per_frame=10,
)
QWEN3_VL_MOE = dataclasses.replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    config_class=Qwen3VLMoeConfig,
    model_class=Qwen3VLMoeForConditionalGeneration,
    published={
        "Qwen3-VL-30B-A3B-Instruct": _qwen3_vl(
            2048, 6144, 48, 32, 4, 151936, tied=False, tower=LARGE_TOWER, deepstack=[8, 16, 24],
            moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        )
    },
    tiny={**QWEN3_VL.tiny, "text_config": QWEN3_VL.tiny["text_config"] | TINY_EXPERTS},
)  # fmt: skip
QWEN3_5 = dataclasses.replace(
    QWEN3_VL,
    name="qwen3_5",
    config_class=Qwen3_5Config,
    model_class=Qwen3_5ForConditionalGeneration,
    kept={
        4: Kept((6, 8, 6, 4), (10, 2), per_linear_token=(6, 3, 23, 4)),
        2: Kept((10, 9, 8, 4), (10, 2), per_linear_token=(10, 4, 42, 4)),
    },
    kept_fused=Kept((4, 5, 1, 3), (8, 2), per_linear_token=(4, 2, 3, 3), per_gathered_key=2),
    published={
        "Qwen3.5-0.8B": _qwen3_5(1024, 3584, 24, 8, 2, tied=True, tower=(768, 3072, 12, 12), value_heads=16),
        "Qwen3.5-2B": _qwen3_5(2048, 6144, 24, 8, 2, tied=True, tower=SMALL_TOWER, value_heads=16),
        "Qwen3.5-4B": _qwen3_5(2560, 9216, 32, 16, 4, tied=True, tower=SMALL_TOWER, value_heads=32),
        "Qwen3.5-9B": _qwen3_5(4096, 12288, 32, 16, 4, tied=False, tower=LARGE_TOWER, value_heads=32),
        "Qwen3.5-27B": _qwen3_5(5120, 17408, 64, 24, 4, tied=False, tower=LARGE_TOWER, value_heads=48),
    },
    tiny={
        "text_config": {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": TINY_ROPE
            | {"mrope_section": [4, 2, 2], "partial_rotary_factor": 0.5, "mrope_interleaved": True},
        },
        "vision_config": {"num_position_embeddings": 64},
    },
    layer_types=frozenset({"full_attention", "linear_attention"}),
    norm_offset=1.0,
    norm_casting="gemma",
    wide_parameters=("A_log", "dt_bias"),
    has_output_gate=True,
)
QWEN3_5_MOE = dataclasses.replace(
    QWEN3_5,
    name="qwen3_5_moe",
    config_class=Qwen3_5MoeConfig,
    model_class=Qwen3_5MoeForConditionalGeneration,
    published={"Qwen3.5-35B-A3B": _qwen3_5(2048, 512, 40, 16, 2, tied=False, tower=LARGE_TOWER, value_heads=32)},
    tiny={
        **QWEN3_5.tiny,
        "text_config": QWEN3_5.tiny["text_config"] | TINY_EXPERTS | {"shared_expert_intermediate_size": 96},
    },
)
FAMILIES = {family.name: family for family in (QWEN2_5_VL, QWEN3_VL, QWEN3_VL_MOE, QWEN3_5, QWEN3_5_MOE)}
UNSUPPORTED = {
    "qwen4_exp": "its n-gram embeddings and dilated convolutions reach back over the start of an answer in ways that "
    "packed rows do not follow, and its attention selects tokens by an index of its own",
    "qwen2_vl": "its videos have no clock: positions count frames",
    "qwen3_omni_moe": "sound is interleaved with its frames",
    "qwen2_5_omni": "sound is interleaved with its frames",
    "qwen3_next": "it reads no videos",
}
"""Model types that are near to the supported ones, and what in them is not."""


def family_named(name: str, setting: str = "family") -> Family:
    """The record of a family. Raises ValueError that names the setting, the value and the choices."""
    if name not in FAMILIES:
        raise ValueError(f"{setting}={name!r}: {choose_from(name, FAMILIES)}")
    return FAMILIES[name]


def why_refused(settings: Mapping[str, Any]) -> str:
    """Of a config.json by its type alone; empty where that is supported or absent."""
    model_type = settings.get("model_type")
    if model_type in FAMILIES or not isinstance(model_type, str):
        return ""
    why = f" ({UNSUPPORTED[model_type]})" if model_type in UNSUPPORTED else ""
    return f"model_type={model_type!r} is not supported{why}; supported: {', '.join(FAMILIES)}"


def family_of(model_config: Any) -> Family:
    """The family of a transformers configuration. Raises ValueError for a type that is not supported."""
    if refused := why_refused({"model_type": model_config.model_type}):
        raise ValueError(refused)
    return FAMILIES[model_config.model_type]


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

"""Qwen2.5-VL at its published shapes with random weights, and prompts with a video of 3584 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.step_contenders import EOS, IMAGE, VIDEO, VISION_END, VISION_START, make_prompt, random_group
from tempsamp_fast.batch import Prompt
from tempsamp_fast.packing import PackedRow, PackingMode, pack

Size = Literal["3B", "7B"]

HEAD_SHAPES = {"3B": (2048, 151936), "7B": (3584, 152064)}
"""(hidden size, vocabulary)."""
SPECIAL_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PROMPT_LEN, GRID = 3700, (16, 28, 32)


def model_config(
    size: Size, *, depth: int | None = None, special_ids: dict[str, int] = SPECIAL_IDS
) -> Qwen2_5_VLConfig:
    """The configuration of the published checkpoint; `depth` cuts both stacks to that many layers."""
    hidden_size, vocab_size = HEAD_SHAPES[size]
    layers, heads, kv_heads, intermediate = {"3B": (36, 16, 2, 11008), "7B": (28, 28, 4, 18944)}[size]
    text = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate,
        "num_hidden_layers": depth or layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    vision = {
        "depth": depth or 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [depth - 1] if depth else [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "3B", **special_ids)


def random_model(config: Qwen2_5_VLConfig, dtype: torch.dtype = torch.bfloat16) -> Qwen2_5_VLForConditionalGeneration:
    """On the GPU, the same weights every time."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)


def video_prompt(seed: int = 0) -> Prompt:
    """3700 tokens, 3584 of them video, on the CPU."""
    return make_prompt(PROMPT_LEN, GRID, seed)


def on_gpu(prompt: Prompt) -> Prompt:
    """For plain Hugging Face calls: ids and bf16 pixels on the GPU."""
    video = replace(prompt.video, pixel_values=prompt.video.pixel_values.cuda().bfloat16())
    return replace(prompt, input_ids=prompt.input_ids.cuda(), video=video)


def packed_rows(
    config: Qwen2_5_VLConfig,
    completion_len: int,
    num_generations: int,
    *,
    num_groups: int = 1,
    mode: PackingMode = "shared_prefix",
) -> list[PackedRow]:
    """Random groups as rows on the GPU: all groups in one row, or with mode "none" an answer per row."""
    groups = [random_group(video_prompt(seed), completion_len, num_generations) for seed in range(num_groups)]
    longest = 10**9 if mode == "shared_prefix" else PROMPT_LEN + completion_len
    return [row.to("cuda") for row in pack(groups, config=config, max_tokens_per_row=longest, mode=mode)]

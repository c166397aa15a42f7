"""Models, prompts and rows at their published sizes, on the pretended card and without drawing weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from bench.gpu_sections.models import PUBLISHED, SPECIAL_IDS
from bench.step_contenders import VIDEO, VISION_END, VISION_START, random_group
from tempsamp_fast.batch import Prompt
from tempsamp_fast.config import ModelConfig
from tempsamp_fast.model.architectures import model_config
from tempsamp_fast.model.families import FAMILIES, family_of
from tempsamp_fast.model.packing import PackedRow, pack

CHECKPOINTS = {
    "3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7B": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen3-VL-8B": "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen3.5-4B": "Qwen/Qwen3.5-4B",
}
GRID, PROMPT_LEN = PUBLISHED.grid, PUBLISHED.prompt_len
"""3,584 tokens of video in a prompt of 3,700."""


@contextmanager
def undrawn() -> Iterator[None]:
    """Modules made inside leave their weights as they come: nobody looks at them."""
    kept = nn.Linear.reset_parameters, nn.Embedding.reset_parameters
    nn.Linear.reset_parameters = nn.Embedding.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        with no_init_weights():
            yield
    finally:
        nn.Linear.reset_parameters, nn.Embedding.reset_parameters = kept  # type: ignore[method-assign]


def config_of(size: str, depth: int | None = None) -> Any:
    """The published configuration, of both stacks the first `depth` layers."""
    config = model_config(ModelConfig(model=CHECKPOINTS[size]))
    for name, value in SPECIAL_IDS.items():
        setattr(config, name, value)
    if depth:
        config.text_config.num_hidden_layers = config.vision_config.depth = depth
        if hasattr(config.text_config, "layer_types"):
            config.text_config.layer_types = config.text_config.layer_types[:depth]
        for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if hasattr(config.vision_config, name):
                setattr(config.vision_config, name, [depth - 1])
    return config


def model_of(size: str, depth: int | None = None, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    config = config_of(size, depth)
    with undrawn(), torch.device("cuda"):
        return FAMILIES[config.model_type].model_class._from_config(config, dtype=dtype)


def prompt_of(config: Any, seed: int = 0) -> Prompt:
    """On the CPU, pixels in uint8 as the trainer's loader gives them."""
    prompt, vision = PUBLISHED.video_prompt(seed), config.vision_config
    t, h, w = GRID
    if family_of(config).has_timestamps:
        frame = [VISION_START, *[VIDEO] * (h * w // vision.spatial_merge_size**2), VISION_END]
        times = [each for index in range(t) for each in (5, 6, 7 + index, *frame)]
        prompt = replace(prompt, input_ids=torch.tensor([*range(30, 90), *times]))
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.zeros(t * h * w, width, dtype=torch.uint8)
    return replace(prompt, video=replace(prompt.video, pixel_values=pixels))


@dataclass(frozen=True)
class Shape:
    """Prompts with answers of equal length."""

    completion_len: int = 32
    num_generations: int = 8
    num_groups: int = 1
    is_tree: bool = False
    """Whether the groups ask about one video."""


def rows_of(config: Any, shape: Shape, is_packed: bool = True) -> list[PackedRow]:
    """On the CPU; all groups in one row, or every answer in one of its own."""
    prompts = [prompt_of(config, seed) for seed in range(shape.num_groups)]
    if shape.is_tree:
        first = prompts[0]
        questions = torch.arange(5, 65).repeat(shape.num_groups, 1) + torch.arange(shape.num_groups)[:, None]
        prompts = [replace(first, input_ids=torch.cat([first.input_ids, question])) for question in questions]
    groups = [random_group(prompt, shape.completion_len, shape.num_generations) for prompt in prompts]
    if is_packed:
        return pack(groups, config=config, max_tokens_per_row=10**9)
    longest = len(groups[0].prompt.input_ids) + shape.completion_len
    return pack(groups, config=config, max_tokens_per_row=longest, mode="none")

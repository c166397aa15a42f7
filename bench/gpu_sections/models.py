"""Qwen2.5-VL at its published shapes with random weights, prompts with a video of 3584 tokens, and what they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from bench.step_contenders import EOS, IMAGE, VIDEO, VISION_END, VISION_START, make_prompt, random_group
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.architectures import count_parameters
from tempsamp_fast.model.packing import PackedRow, PackingMode, pack
from tempsamp_fast.planning.estimate import Work, step_memory

Size = Literal["3B", "7B"]

HEAD_SHAPES = {"3B": (2048, 151936), "7B": (3584, 152064)}
"""(hidden size, vocabulary)."""
SPECIAL_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PLAIN_LAYERS = ("--liger_layers=off",)
UNSTEPPED = ("--zero_stage=1", "--offload=optimizer")
"""The plan leaves out what DeepSpeed holds while it steps."""
RECOMPUTED = ("--gradient_checkpointing=true",)
TOWER_RECOMPUTED = (*RECOMPUTED, "--checkpoint_every=1000")
"""Settings of the trainer; of the decoder layers only the first is recomputed."""


def model_config(
    size: Size,
    *,
    depth: int | None = None,
    special_ids: Mapping[str, int] = SPECIAL_IDS,
    text_values: Mapping[str, Any] | None = None,
    vision_values: Mapping[str, Any] | None = None,
) -> Qwen2_5_VLConfig:
    """The configuration of the published checkpoint; `depth` cuts both stacks to that many layers.

    text_values, vision_values: in place of the published ones.
    """
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
        **(text_values or {}),
    }
    vision = {
        "depth": depth or 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": hidden_size,
        "fullatt_block_indexes": [depth - 1] if depth else [7, 15, 23, 31],
        "tokens_per_second": 2,
        **(vision_values or {}),
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size == "3B", **special_ids)


def random_model(
    config: Qwen2_5_VLConfig, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"
) -> Qwen2_5_VLForConditionalGeneration:
    """The same weights every time."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)


@dataclass(frozen=True)
class Scale:
    """Where whole models run, and how large they are; as published on a GPU, or in miniature to try a section out."""

    device: str = "cuda"
    prompt_len: int = 3700
    grid: tuple[int, int, int] = (16, 28, 32)
    wide_grid: tuple[int, int, int] = (8, 28, 64)
    """As many tokens of a video whose frames are wider than it is long: there transformers' positions are ours."""
    rounds: int = 4
    """How often what is timed takes its turn."""
    cache_share: float = 0.5
    """Of the free memory, for the keys and values of continuous batching: more than it needs, and room for ours."""
    text_values: Mapping[str, Any] | None = None
    vision_values: Mapping[str, Any] | None = None

    def config(self, size: Size, *, depth: int | None = None) -> Qwen2_5_VLConfig:
        return model_config(size, depth=depth, text_values=self.text_values, vision_values=self.vision_values)

    def model(
        self, size: Size, dtype: torch.dtype = torch.bfloat16, *, depth: int | None = None
    ) -> Qwen2_5_VLForConditionalGeneration:
        """With a configuration of its own, since a policy writes its attention there."""
        return random_model(self.config(size, depth=depth), dtype, self.device)

    def video_prompt(self, seed: int = 0) -> Prompt:
        """On the CPU."""
        return make_prompt(self.prompt_len, self.grid, seed)

    def text_prompt(self, seed: int = 0) -> Prompt:
        """As long, without a video; on the CPU."""
        return make_prompt(self.prompt_len, (0, 0, 0), seed)

    def on_device(self, prompt: Prompt) -> Prompt:
        """For plain Hugging Face calls: ids and bf16 pixels."""
        video = replace(prompt.video, pixel_values=prompt.video.pixel_values.to(self.device, torch.bfloat16))
        return replace(prompt, input_ids=prompt.input_ids.to(self.device), video=video)

    def rows(
        self,
        config: Qwen2_5_VLConfig,
        completion_len: int,
        num_generations: int,
        *,
        num_groups: int = 1,
        max_groups_per_row: int = 10**6,
        mode: PackingMode = "shared_prefix",
    ) -> list[PackedRow]:
        """Random groups as rows on the device: all in one if there is room, or with mode "none" an answer per row."""
        groups = [random_group(self.video_prompt(seed), completion_len, num_generations) for seed in range(num_groups)]
        per_row = (max_groups_per_row, num_generations) if mode == "shared_prefix" else (1, 1)
        longest = per_row[0] * (self.prompt_len + per_row[1] * completion_len)
        return [row.to(self.device) for row in pack(groups, config=config, max_tokens_per_row=longest, mode=mode)]

    def update_gib(
        self,
        config: Qwen2_5_VLConfig,
        completion_len: int,
        num_generations: int,
        *,
        num_groups: int = 1,
        grid: tuple[int, int, int] | None = None,
        settings: Sequence[str] = (),
        copies: int = 2,
    ) -> float:
        """Memory of a forward and backward pass over one packed row of bf16, by the trainer's own arithmetic.

        grid: of the videos; None is `self.grid`.
        settings: flags of the trainer, such as RECOMPUTED.
        copies: tensors as large as the weights: these and their gradients, or also moments and a reference.
        """
        flags = [
            "--phases=grpo:1",
            *UNSTEPPED,
            f"--prompts_per_device={num_groups}",
            f"--max_tokens_per_row={10**9}",
            *settings,
        ]
        trainer = parse_args(flags)
        work = Work(grid or self.grid, self.prompt_len, completion_len, num_generations, num_generations)
        memory = step_memory(work, config, count_parameters(config, trainer.model), trainer, 2, 1)
        return (copies * memory.weights + memory.activations) / 2**30


PUBLISHED = Scale()

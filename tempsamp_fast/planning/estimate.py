"""Tokens, FLOPs, memory and traffic of a step, by arithmetic: what `--dry_run` and `python -m tempsamp_fast.plan` say.

Activations are those that autograd keeps: of transformers' layers in eager mode counted by hooks on its saved tensors,
of the kernels for GPUs by a rehearsal. What passes through in between is taken as one layer's working set, so that a
peak may lie a tenth above or below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tempsamp_kernels.head import chunk_rows, num_panels

from tempsamp_fast.config import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainConfig,
    parse_phases,
    prompts_per_row,
)
from tempsamp_fast.learning.deepspeed_settings import effective_zero
from tempsamp_fast.model.architectures import Parameters
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.flops import layout_flops
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.shapes import text_shape
from tempsamp_fast.video import Geometry

TEXT_TOKENS = 116
"""Of a prompt besides its video: chat format, query, instructions."""
FRAME_SIZE = (720, 1280)
"""(height, width) in pixels that videos are taken to have: the pixel budgets bind long before."""
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Elements; DeepSpeed's defaults of reduce_bucket_size, and of stage3_max_live_parameters and sub_group_size."""


@dataclass(frozen=True)
class Work:
    """One prompt with its answers, as the estimate takes it."""

    grid_thw: tuple[int, int, int]
    prompt_len: int
    answer_len: int
    num_answers: int
    num_sampled: int
    queries: float = 1.0
    """About the same video in the same row, on average; what they share counts once for all."""

    @property
    def num_tokens(self) -> int:
        """Of the prompt, its video and its answers, alone in a row."""
        return self.prompt_len + self.num_answers * self.answer_len

    @property
    def num_shared(self) -> int:
        """Tokens that all prompts about the video begin with."""
        return self.prompt_len - TEXT_TOKENS

    @property
    def tokens_in_row(self) -> float:
        """Of a prompt with its share of the video."""
        return self.num_tokens - (1 - 1 / self.queries) * self.num_shared

    @property
    def patches_in_row(self) -> float:
        """A prompt's share of those of the video."""
        return math.prod(self.grid_thw) / self.queries

    def forward_flops(self, num_answers: int, model_config: Any) -> float:
        """Of one pass over the prompt and so many answers."""
        layout = GroupLayout(self.prompt_len, (self.answer_len,) * num_answers)
        alone = layout_flops([layout], max(1, num_answers * self.answer_len), [self.grid_thw], model_config)
        if self.queries == 1:
            return alone
        shared = GroupLayout(self.num_shared, ())
        return alone - (1 - 1 / self.queries) * layout_flops([shared], 0, [self.grid_thw], model_config)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step, by what they are for."""

    weights: float
    reference: float
    gradients: float
    optimizer: float
    buffers: float
    """DeepSpeed's buckets, or the parameters that ZeRO-3 has gathered."""
    activations: float
    """The largest of sampling (keys, values, states), updating (what autograd keeps, the head with its gradient) and
    the optimizer's step (gradients in fp32). With CUDA graphs what sampling takes is kept beside the others."""
    off_gpu: float = 0.0
    """Offloaded to the memory or disk of the machine, per GPU; not in the total."""

    @property
    def total(self) -> float:
        return sum(vars(self).values()) - self.off_gpu


def video_grid(geometry: Geometry, num_frames: int, frame_size: tuple[int, int]) -> tuple[int, int, int]:
    """Patches of `num_frames` frames of (height, width) pixels."""
    return geometry.grid_thw(num_frames, geometry.frame_size(num_frames, *frame_size))


def num_frames(duration_s: float, data: DataConfig) -> int:
    """Frames that are taken of a video."""
    return min(max(int(duration_s * data.fps) // 2 * 2, data.min_frames), data.max_frames)


def text_and_video_tokens(grid_thw: tuple[int, int, int], model_config: Any, text_tokens: int = TEXT_TOKENS) -> int:
    """Tokens of a prompt whose text, but for what is written between frames, has `text_tokens`."""
    t, h, w = grid_thw
    return text_tokens + t * family_of(model_config).text_tokens_per_frame + t * h * w // 4


def work_of(
    grid_thw: tuple[int, int, int],
    model_config: Any,
    method: str,
    num_generations: int,
    answer_len: int,
    queries: float = 1.0,
) -> Work:
    """One prompt of a phase of `method`, with so many `queries` about its video."""
    num_answers = 1 if method == "sft" else num_generations
    num_sampled = {"sft": 0, "grpo": num_generations, "tempsamp": num_generations - 1}[method]
    prompt_len = text_and_video_tokens(grid_thw, model_config)
    return Work(grid_thw, prompt_len, answer_len, num_answers, num_sampled, queries)


def step_flops(work: Work, model_config: Any, config: Config, method: str, num_prompts: int) -> float:
    """FLOPs of one device's share of a step: sampling, reference, update; recomputation counted where it happens.

    num_prompts: of this device.
    """
    sampling = work.forward_flops(work.num_sampled, model_config) if work.num_sampled else 0.0
    recomputed = _num_updates(config.algorithm, method) * work.forward_flops(work.num_answers, model_config)
    without = num_prompts * sampling + update_flops(work, model_config, config.algorithm, method, num_prompts)
    return without + (num_prompts * recomputed if config.model.gradient_checkpointing else 0.0)


def update_flops(work: Work, model_config: Any, algorithm: AlgorithmConfig, method: str, num_prompts: int) -> float:
    """FLOPs of one device's updates of a step with the log-probs that they need; recomputation not counted.

    num_prompts: of this device.
    """
    updates = _num_updates(algorithm, method)
    has_reference = method != "sft" and algorithm.beta > 0
    passes = 3 * updates + int(has_reference) + int(updates > 1)
    return num_prompts * passes * work.forward_flops(work.num_answers, model_config)


def _num_updates(algorithm: AlgorithmConfig, method: str) -> int:
    return 1 if method == "sft" else algorithm.updates_per_batch


def step_memory(
    work: Work, model_config: Any, parameters: Parameters, config: Config, bytes_per_value: int, world_size: int
) -> Memory:
    """Of one device under the configured ZeRO stage and offload, on `world_size` devices."""
    b, (stage, offloaded) = bytes_per_value, effective_zero(config.train)
    trained = parameters.trained(config.model)
    partition = world_size if stage == 3 else 1
    phases = parse_phases(config.train.phases)
    has_reference = config.algorithm.beta > 0 and any(phase.method != "sft" for phase in phases)
    weights = b * parameters.total / partition + b * (parameters.adapters if config.model.lora_rank else 0)
    reference = b * parameters.total / partition if has_reference and not config.model.lora_rank else 0.0
    if stage == 0 and b == 4:
        gradients, optimizer = 4.0 * trained, 8.0 * trained
    else:
        # fp32 weights and two moments, shared out; bf16 gradients, by stage 0 in fp32 too
        full = (b + 4.0 if stage == 0 else b) * trained
        whole = stage < 2 or (stage == 2 and config.train.reduce_gradients == "step")
        gradients, optimizer = full / (1 if whole else world_size), 12.0 * trained / world_size
    buffers = 0.0
    if stage in (1, 2):
        buffers = b * min(trained, REDUCE_BUCKET)
    elif stage == 3:
        buffers = b * min(parameters.total, LIVE_PARAMETERS)
    off_gpu = 0.0
    if "optimizer" in offloaded:
        off_gpu, optimizer = optimizer, 0.0
        if not whole:
            off_gpu, gradients = off_gpu + gradients, 0.0
    if "param" in offloaded:
        off_gpu, weights, reference = off_gpu + weights + reference, 0.0, 0.0
    update = _kept_activations(work, model_config, config, b) + _head_bytes(
        work, model_config, parameters, config.model
    )
    # While it steps, DeepSpeed holds its share of the gradients in fp32 too, in stages 1 and 2 beside two flat copies;
    # by stage 3 of a group of parameters.
    copies = 4.0 + (2 * b if stage in (1, 2) else 0)
    stepping = 0.0 if (stage == 0 and b == 4) or "optimizer" in offloaded else copies * trained / world_size
    if stage == 3:
        stepping = min(stepping, 4.0 * LIVE_PARAMETERS)
    sampling = _sampling_bytes(work, model_config, config.train, b)
    activations = max(update, sampling, stepping)
    has_graphs = b == 2 and stage < 3 and config.rollout.cuda_graphs is not False
    if work.num_sampled and has_graphs and config.rollout.rollout_backend == "policy":
        activations = sampling + max(update, stepping)  # what graphs were recorded on stays where it is
    return Memory(weights, reference, gradients, optimizer, buffers, activations, off_gpu)


def gathered_rollout(
    work: Work, model_config: Any, parameters: Parameters, config: Config, bytes_per_value: int, world_size: int
) -> float:
    """Bytes on one device while ZeRO-3 holds all weights whole for a rollout, beside what stays from step to step."""
    memory = step_memory(work, model_config, parameters, config, bytes_per_value, world_size)
    stays = memory.weights + memory.reference + memory.gradients + memory.optimizer
    sampling = _sampling_bytes(work, model_config, config.train, bytes_per_value)
    return stays + bytes_per_value * parameters.total + sampling


def _kept_activations(work: Work, model_config: Any, config: Config, b: int) -> float:
    """Of one rank, of a row that `sequence_parallel_size` share, with a layer's working set more: the gradients that
    pass through it; with another one where every layer is recomputed.
    """
    family, model = family_of(model_config), config.model
    fused = family.kept_fused if b == 2 and model.liger_layers != "off" else None
    kept = fused or family.kept[b]
    shape, vision = text_shape(model_config), model_config.vision_config
    prompts = max(prompts_per_row(config.train, phase) for phase in parse_phases(config.train.phases))
    ranks = config.train.sequence_parallel_size
    rows = min(prompts, max(1, config.train.max_tokens_per_row * ranks // work.num_tokens))
    num_tokens, num_patches = rows * work.tokens_in_row / ranks, rows * work.patches_in_row / ranks
    sizes = shape.hidden, shape.query, shape.key, shape.intermediate
    linear_sizes = shape.hidden, shape.channels, shape.linear_value, shape.intermediate
    attending = b * num_tokens * sum(c * size for c, size in zip(kept.per_token, sizes, strict=True))
    num_gathered = work.prompt_len + work.num_answers * (work.prompt_len + work.answer_len)
    kv_heads = model_config.text_config.num_key_value_heads
    attending += b * rows * num_gathered * kept.per_gathered_key * shape.key / min(ranks, kv_heads)
    linear = b * num_tokens * sum(c * size for c, size in zip(kept.per_linear_token, linear_sizes, strict=True))
    # Every answer goes on from a copy of its prompt's state.
    linear += 4 * rows * work.num_answers * shape.state
    layers = shape.num_attending * attending + shape.num_linear * linear
    num_recomputed = -(-shape.num_layers // model.checkpoint_every) if model.gradient_checkpointing else 0
    working = max(attending, linear) * (2 if num_recomputed == shape.num_layers else 1)
    held = layers * (shape.num_layers - num_recomputed) / shape.num_layers + working
    text = held + num_recomputed * b * num_tokens * shape.hidden
    patch_sizes = vision.hidden_size, vision.intermediate_size
    block = b * num_patches * sum(c * size for c, size in zip(kept.per_patch, patch_sizes, strict=True))
    pixels = 4 * num_patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    if model.freeze_vision or model.lora_rank:
        return text + pixels
    if model.gradient_checkpointing and model.checkpoint_vision:  # a block's turn comes when the text's are over
        return max(text, 2 * block) + vision.depth * b * num_patches * vision.hidden_size + pixels
    return text + vision.depth * block + pixels


def _head_bytes(work: Work, model_config: Any, parameters: Parameters, model: ModelConfig) -> float:
    """A chunk of fp32 logits, and the fp32 gradient of a trained output embedding.

    On a GPU two chunks, and their gradients in half precision: where one panel holds all, there is no fp32 one.
    """
    vocab_size, num_tokens = model_config.text_config.vocab_size, work.num_answers * work.answer_len
    weight = 0.0 if model.lora_rank else 4.0 * parameters.head
    if not torch.cuda.is_available():
        return 4.0 * chunk_rows(num_tokens, vocab_size, "cpu") * vocab_size + weight
    panels, rows = num_panels(num_tokens, vocab_size), chunk_rows(num_tokens, vocab_size, "cuda")
    logits = 4.0 * min(2 * rows, num_tokens) * vocab_size
    return logits + 2.0 * num_tokens / panels * vocab_size + (weight if panels > 1 else 0.0)


def _sampling_bytes(work: Work, model_config: Any, train: TrainConfig, b: int) -> float:
    """Keys and values of every prompt of the step once, and of its sampled answers, and a state for each of those."""
    shape = text_shape(model_config)
    per_token = 2 * b * shape.num_attending * shape.key
    per_answer = shape.num_linear * (4 * shape.state + b * (shape.kernel - 1) * shape.channels)
    phases = parse_phases(train.phases)
    prompts = max(prompts_per_row(train, phase) for phase in phases) * train.gradient_accumulation_steps
    num_tokens = work.prompt_len + work.num_sampled * work.answer_len
    return float(prompts * (per_token * num_tokens + per_answer * work.num_sampled))


def largest(grids: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """The grid of the most patches."""
    return max(grids, key=lambda grid: grid[0] * grid[1] * grid[2])

"""What a frozen vision tower makes of videos: computed once, for rollout, reference, update and later epochs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from tempsamp_fast.batch import Prompt, VideoPatches
from tempsamp_fast.learning.partitioned import forward_of, is_partitioned
from tempsamp_fast.model.packing import idle_video
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.system.device import sent
from tempsamp_fast.system.ranks import max_over_ranks


@torch.no_grad()
def with_vision_features(policy: Any, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with features in place of pixels; a video that several of them share is encoded once.

    policy: a `Policy`, or a DeepSpeed engine around one. Where that partitions parameters (ZeRO-3), all ranks must call
        this together.
    Raises ValueError when the tower is trained, since its features change with every update.
    """
    module = getattr(policy, "module", policy)
    if not module.has_frozen_tower:
        raise ValueError("with_vision_features needs a frozen vision tower, and this one is trained")
    device = next(module.parameters()).device
    forward = module if module is policy else forward_of(policy)

    def encoded(video: VideoPatches) -> VideoPatches:
        pixels = video.pixel_values
        features = forward(replace(video, pixel_values=pixels.to(device)))
        return replace(video, pixel_values=pixels.new_empty(0, pixels.shape[1]), features=features)

    missing = {id(prompt.video): prompt.video for prompt in prompts if prompt.video.features is None}
    num_passes = len(missing) if forward is module else max_over_ranks(len(missing), device)
    made = {key: encoded(video) for key, video in missing.items()}
    for _ in range(num_passes - len(missing)):
        encoded(idle_video(module.config))
    return [replace(prompt, video=made.get(id(prompt.video), prompt.video)) for prompt in prompts]


def with_pixels_on(device: torch.device, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts with the pixels of their videos on the device, each video sent once for all passes of a step."""
    videos = {id(prompt.video): prompt.video for prompt in prompts}
    moved = {key: replace(video, pixel_values=sent(video.pixel_values, device)) for key, video in videos.items()}
    return [replace(prompt, video=moved[id(prompt.video)]) for prompt in prompts]


def features_key(policy: Policy, is_cached: bool) -> str:
    """The fingerprint under which features are kept (`cache_features`), empty where they are not.

    Raises ValueError for a tower that is trained or partitioned.
    """
    if not is_cached:
        return ""
    if not policy.has_frozen_tower:
        raise ValueError("cache_features=True: the vision tower is trained, so its features change; freeze_vision")
    if is_partitioned(policy):
        raise ValueError("cache_features=True: partitioned ranks encode videos in step; choose zero_stage 2")
    return tower_fingerprint(policy.base_model)


def tower_fingerprint(model: PreTrainedModel) -> str:
    """Two towers with the same one make the same features of a video."""
    visual: Any = model.model.visual
    digest = hashlib.sha256(model.config.vision_config.to_json_string().encode())
    for name, parameter in visual.named_parameters():
        assert parameter.numel(), f"{name} is partitioned"
        digest.update(f"{name} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

"""The vision tower without what makes a GPU slow: convolutions of a single patch, and waits for facts about grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.system.device import sent
from tempsamp_fast.video import normalise_rows

KEPT_GRIDS = 32
"""Sets of grids whose facts stay on the device, under 2 MB each."""


def prepare_tower(model: PreTrainedModel) -> None:
    """Patches by one matrix product, and deepstack features added at known places. Parameters keep their names."""
    projection = model.model.visual.patch_embed.proj
    projection.forward = MethodType(_patch_product, projection)
    text = model.model.language_model
    if hasattr(text, "_deepstack_process"):
        text._deepstack_process = MethodType(_add_at, text)


def run_tower(model: PreTrainedModel, pixel_values: Tensor, video_grid_thw: Tensor) -> Any:
    """transformers' output of the tower.

    pixel_values: [num_patches, patch_dim], normalised, or uint8: these are normalised here, on their device.
    video_grid_thw: [num_videos, 3] int64; on the CPU nothing waits for the device.
    """
    visual = model.model.visual
    if pixel_values.dtype == torch.uint8:
        pixel_values = normalise_rows(pixel_values, geometry_of(model.config), visual.dtype)
    grids = tuple(map(tuple, video_grid_thw.tolist()))
    vision = model.config.vision_config
    num_positions = getattr(vision, "num_position_embeddings", 0) if hasattr(visual, "pos_embed") else 0
    sizes = vision.spatial_merge_size, getattr(vision, "window_size", 0), vision.patch_size, num_positions
    facts = _facts(grids, sizes, pixel_values.device)
    return visual(pixel_values.to(visual.dtype), grid_thw=video_grid_thw.cpu(), **facts)


def _patch_product(projection: nn.Module, patches: Tensor) -> Tensor:
    """A convolution whose kernel is as large as its input [N, channels, time, height, width] -> [N, embed_dim]."""
    weight: Any = projection.weight
    product = patches.flatten(1) @ weight.flatten(1).T
    return product if projection.bias is None else product + projection.bias


def _add_at(text: Any, hidden_states: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """hidden_states [1, N, hidden_size] with features [P, hidden_size] added at `places` [P], no place twice.

    A plain forward of transformers gives a mask for places, and gets what transformers makes of it.
    """
    if places.dtype == torch.bool:
        return type(text)._deepstack_process(text, hidden_states, places, features)
    return hidden_states.index_add(1, places, features.to(hidden_states.dtype)[None])


@lru_cache(KEPT_GRIDS)
def _facts(
    grids: Sequence[tuple[int, int, int]], sizes: tuple[int, int, int, int], device: torch.device
) -> dict[str, Any]:
    """What the tower would find out on the device, and wait for; keywords of its forward.

    sizes: spatial merge, window (0: none) and patch size; learned positions to interpolate (0: none).
    """
    merge, window, patch, num_positions = sizes
    grid = torch.tensor(grids)
    cu_seqlens = get_vision_cu_seqlens(grid)
    tensors = {"position_ids": get_vision_position_ids(grid, merge), "cu_seqlens": cu_seqlens}
    longest = {"max_seqlen": _longest(cu_seqlens)}
    if window:
        tensors["window_index"], tensors["cu_window_seqlens"] = get_vision_window_index(grid, merge, window, patch)
        longest["max_window_seqlen"] = _longest(tensors["cu_window_seqlens"])
    if num_positions:
        tensors["interp_indices"], tensors["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid, int(num_positions**0.5), align_corners=True, spatial_merge_size=merge
        )
    return {name: sent(tensor, device) for name, tensor in tensors.items()} | longest


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())

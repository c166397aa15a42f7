"""Floating-point operations of a packed row's forward pass, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import PackedRow
from tempsamp_fast.model.shapes import text_shape

GPUS = {
    "H200 NVL": (835, 141), "H200": (989, 141), "H100 NVL": (835, 94), "H100 PCIe": (756, 80), "H100": (989, 80),
    "H800": (989, 80), "GH200": (989, 96), "H20": (148, 96), "B200": (2250, 180), "A100": (312, 80), "A800": (312, 80),
    "L40S": (362, 48), "L40": (181, 48), "L4": (121, 24), "A40": (150, 48), "A10": (125, 24),
}  # fmt: skip
"""Dense bf16 TFLOP/s and GB of memory, by the vendor's data sheets; of several names the first one that matches
counts, of cards sold with several sizes of memory the larger."""


def known_gpu(device_name: str) -> str | None:
    """The name in `GPUS` of a GPU by its CUDA device name, None for one that is not there."""
    words = set(re.split(r"[\s-]+", device_name))
    return next((gpu for gpu in GPUS if words.issuperset(gpu.split())), None)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its CUDA device name, None for one that is not in the table."""
    gpu = known_gpu(device_name)
    return 1e12 * GPUS[gpu][0] if gpu else None


def device_peak_flops(device: torch.device) -> float | None:
    """`peak_bf16_flops` of a device; None for a CPU."""
    return peak_bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def forward_flops(row: PackedRow, config: Any) -> float:
    """`layout_flops` of a row; its vision tower counts unless the row brings its features."""
    grids = row.video_grid_thw.tolist() if row.vision is None else []
    return layout_flops(row.layout, len(row.logit_indices), grids, config)


def layout_flops(
    layout: Sequence[GroupLayout], num_predicted: int, grids: Iterable[tuple[int, int, int]], config: Any
) -> float:
    """FLOPs of one forward pass over groups and their videos: matrix products and attention, two per multiply-add.

    Counts what is attended, each prompt once, the experts that a token passes, and only the predicted tokens at the
    head; linear layers token by token, though chunks of them are computed together. A training step is three times
    this; recomputation is not counted.

    grids: patches along time, height and width of every video that the vision tower sees.
    config: the model's transformers configuration.
    """
    shape = text_shape(config)
    attention = 2 * shape.query * _num_attended(layout)
    head = shape.hidden * config.text_config.vocab_size * num_predicted
    num_tokens = sum(group.num_tokens for group in layout)
    total = num_tokens * shape.products + shape.num_attending * attention + head
    return 2.0 * (total + sum(_vision_products(grid, config) for grid in grids))


def _num_attended(layout: Sequence[GroupLayout]) -> int:
    """Pairs of a token and a token it sees."""
    pairs = 0
    for group in layout:
        for node in group.nodes:
            before = sum(group.nodes[each].length for each in node.path)
            pairs += node.length * before + node.length * (node.length + 1) // 2
    return pairs


def _vision_products(grid_thw: tuple[int, int, int], config: Any) -> int:
    """Multiply-adds of the tower and its mergers on one video."""
    vision = config.vision_config
    t, h, w = grid_thw
    num_patches, size = t * h * w, vision.hidden_size
    mlp = family_of(config).vision_mlp_products * size * vision.intermediate_size
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    merged = vision.spatial_merge_size**2 * size
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    merger = num_patches // vision.spatial_merge_size**2 * (merged * merged + merged * vision.out_hidden_size)
    num_full = len(getattr(vision, "fullatt_block_indexes", range(vision.depth)))
    attended = num_full * t * (h * w) ** 2
    if num_full < vision.depth:
        side = vision.window_size // vision.patch_size
        attended += (vision.depth - num_full) * t * _sum_of_squares(h, side) * _sum_of_squares(w, side)
    blocks = vision.depth * num_patches * (4 * size * size + mlp)
    return num_patches * patch * size + blocks + 2 * size * attended + mergers * merger


def _sum_of_squares(length: int, side: int) -> int:
    """Of the pieces that windows of `side` cut `length` into: a window of a x b patches attends (a * b)**2 pairs."""
    return length // side * side**2 + (length % side) ** 2

"""Three-axis rotary positions of a prompt, the same in rollout, policy and reference.

Positions are always passed to the model explicitly: transformers releases disagree with each other (and with the
checkpoints) about where the text after a Qwen2.5-VL video continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempsamp_fast.model.families import family_of

GridTHW = tuple[int, int, int]


def mrope_positions(
    input_ids: Tensor, grids: Sequence[GridTHW], seconds_per_grid: Sequence[float], config: Any
) -> tuple[Tensor, int]:
    """Time, height and width positions of one prompt, and the position at which its answers start.

    Text advances all three axes by one per token and continues at the largest position so far plus one. Qwen2.5-VL:
    the k-th temporal patch of a video lies `floor(k * second_per_grid * tokens_per_second)` after the video's start
    (its technical report, section 2.1.3). Qwen3-VL: time is written as text, and every temporal patch is a block of
    its own between timestamps (its technical report, section 2).

    input_ids: [prompt_len] int64, placeholders expanded to one id per merged patch.
    grids: one (t, h, w) per video, in patches before spatial merging.
    seconds_per_grid: one float per video; unused by Qwen3-VL.
    config: the model's transformers configuration.
    Returns positions [3, prompt_len] int64 and the next free position.
    Raises ValueError when the placeholders do not match the grids.
    """
    blocks = _vision_blocks(grids, seconds_per_grid, config)
    is_vision = input_ids == config.video_token_id
    found, needed = int(is_vision.sum()), sum(block.shape[1] for block in blocks)
    if found != needed:
        raise ValueError(f"input_ids holds {found} video placeholders, but grids {list(grids)} need {needed}")
    positions = torch.empty(3, len(input_ids), dtype=torch.int64)
    index = next_position = 0
    for block in blocks:
        start = index + int(is_vision[index:].int().argmax())
        stop = start + block.shape[1]
        if not bool(is_vision[start:stop].all()):
            raise ValueError(
                f"input_ids has a gap in the {block.shape[1]} video placeholders that start at index {start}: "
                "the placeholders of one block must be contiguous"
            )
        _fill_text(positions, index, start, next_position)
        next_position += start - index
        positions[:, start:stop] = block + next_position
        next_position += int(block.max()) + 1
        index = stop
    _fill_text(positions, index, len(input_ids), next_position)
    return positions, next_position + len(input_ids) - index


def _vision_blocks(grids: Sequence[GridTHW], seconds_per_grid: Sequence[float], config: Any) -> list[Tensor]:
    """Positions [3, block_len] of each contiguous run of placeholders, relative to the run's start."""
    merge = config.vision_config.spatial_merge_size
    has_timestamps, blocks = family_of(config).has_timestamps, []
    for (t, h, w), seconds in zip(grids, seconds_per_grid, strict=True):
        if has_timestamps:
            blocks += [_grid_positions(torch.zeros(1, dtype=torch.int64), h // merge, w // merge)] * t
        else:
            blocks.append(_grid_positions(temporal_positions(t, seconds, config), h // merge, w // merge))
    return blocks


def temporal_positions(num_patches: int, seconds: float, config: Any) -> Tensor:
    """[num_patches] int64: where temporal patches `seconds` apart lie on the clock of Qwen2.5-VL, from the first on."""
    # float32 and this order of operations, as the checkpoints were trained.
    times = torch.arange(num_patches) * torch.tensor(seconds, dtype=torch.float32)
    return (times * config.vision_config.tokens_per_second).long()


def _grid_positions(times: Tensor, height: int, width: int) -> Tensor:
    axes = (times, torch.arange(height), torch.arange(width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def _fill_text(positions: Tensor, start: int, stop: int, first_position: int) -> None:
    positions[:, start:stop] = torch.arange(first_position, first_position + stop - start)

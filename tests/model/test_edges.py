"""Rows at their edges: exactly full ones, and clocks that only float32 keeps as the checkpoints were trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.model.packing import pack, pack_prompts


def test_groups_that_fill_a_row_to_the_last_token_share_it(tiny) -> None:
    groups, config = tiny.groups(), tiny.model().config
    budget = groups[0].num_tokens + groups[1].num_tokens
    shared, last = pack(groups, config=config, max_tokens_per_row=budget)
    assert (len(shared.layout), shared.num_tokens, len(last.layout)) == (2, budget, 1)
    assert [len(row.layout) for row in pack(groups[:2], config=config, max_tokens_per_row=budget - 1)] == [1, 1]


def test_a_group_that_fills_a_row_to_the_last_token_needs_no_stages(tiny) -> None:
    group, config = tiny.groups()[0], tiny.model().config
    (row,) = pack([group], config=config, max_tokens_per_row=group.num_tokens)
    assert row.stages == ()
    (row,) = pack([group], config=config, max_tokens_per_row=group.num_tokens - 1)
    assert row.stages == (1, 3)


def test_a_chunk_is_filled_to_the_last_token(tiny) -> None:
    """Its answers alone count, as its prompt has run before; a prompt as long as a row fits one."""
    config, prompt = tiny.model().config, tiny.prompt((2, 4, 4))
    length = len(prompt.input_ids)
    (row,) = pack([tiny.group(prompt, [length - 1, 1, 2, length])], config=config, max_tokens_per_row=length)
    assert row.stages == (1, 2, 1, 1)
    with pytest.raises(ValueError, match=f"longest answer {length + 1}"):
        pack([tiny.group(prompt, [length + 1])], config=config, max_tokens_per_row=length)
    (row,) = pack_prompts([prompt], config=config, max_tokens_per_row=length)
    assert row.stages == ()
    with pytest.raises(ValueError, match=f"its prompt has {length} tokens"):
        pack_prompts([prompt], config=config, max_tokens_per_row=length - 1)


def test_times_are_float32_multiplied_in_the_order_of_the_checkpoints_training() -> None:
    """Patches of 1.4 s at 25 positions a second: float64 puts the eighth at 244, one factor of 35 the fourth at 105."""
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=25)
    config = SimpleNamespace(model_type="qwen2_5_vl", video_token_id=9, vision_config=vision)
    positions, _ = mrope_positions(torch.full((8,), 9), [(8, 2, 2)], [1.4], config)
    assert positions[0].tolist() == [0, 35, 70, 104, 140, 175, 209, 245]

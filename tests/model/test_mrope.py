"""Rotary positions against hand-computed cases, and against transformers where its releases are right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tempsamp_fast.model.mrope import mrope_positions

PAD = 9


def config(model_type: str, tokens_per_second: int = 2) -> SimpleNamespace:
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    return SimpleNamespace(model_type=model_type, video_token_id=PAD, vision_config=vision)


def test_qwen2_5_time_axis_counts_tokens_per_second() -> None:
    """2 text, 3 temporal patches of 1 x 2 merged patches at 1.5 s, 2 text: time 0, 3, 6; text continues at max + 1."""
    ids = torch.tensor([1, 2, *[PAD] * 6, 3, 4])
    positions, next_position = mrope_positions(ids, [(3, 2, 4)], [1.5], config("qwen2_5_vl"))
    assert positions.tolist() == [
        [0, 1, 2, 2, 5, 5, 8, 8, 9, 10],
        [0, 1, 2, 2, 2, 2, 2, 2, 9, 10],
        [0, 1, 2, 3, 2, 3, 2, 3, 9, 10],
    ]
    assert next_position == 11


def test_qwen2_5_fractional_times_are_floored_not_lost() -> None:
    """At 0.25 s a patch and 2 tokens a second the steps are halves: 0, 0, 1, 1, 2."""
    ids = torch.tensor([*[PAD] * 5, 1])
    positions, _ = mrope_positions(ids, [(5, 2, 2)], [0.25], config("qwen2_5_vl"))
    assert positions[0].tolist() == [0, 0, 1, 1, 2, 3]


def test_qwen3_frames_are_blocks_between_timestamps() -> None:
    """A frame of 2 x 1 merged patches spans two positions whatever its time; the timestamp after it follows."""
    ids = torch.tensor([1, PAD, PAD, 2, 3, PAD, PAD, 4])
    positions, next_position = mrope_positions(ids, [(2, 4, 2)], [99.0], config("qwen3_vl"))
    assert positions.tolist() == [
        [0, 1, 1, 3, 4, 5, 5, 7],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 1, 3, 4, 5, 5, 7],
    ]
    assert next_position == 8


def test_two_videos_with_different_clocks() -> None:
    ids = torch.tensor([PAD, PAD, 1, PAD, PAD])
    positions, next_position = mrope_positions(ids, [(2, 2, 2), (2, 2, 2)], [1.0, 2.0], config("qwen2_5_vl"))
    assert positions[0].tolist() == [0, 2, 3, 4, 8]
    assert next_position == 9


def test_text_alone_counts_up() -> None:
    positions, next_position = mrope_positions(torch.tensor([1, 2, 3]), [], [], config("qwen2_5_vl"))
    assert positions.tolist() == [[0, 1, 2]] * 3
    assert next_position == 3


@pytest.mark.parametrize("num_pads", [3, 5])
def test_placeholders_that_do_not_match_the_grid_are_refused(num_pads: int) -> None:
    with pytest.raises(ValueError, match="placeholders"):
        mrope_positions(torch.tensor([PAD] * num_pads), [(1, 4, 4)], [1.0], config("qwen2_5_vl"))


def test_a_gap_inside_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        mrope_positions(torch.tensor([PAD, PAD, 1, PAD, PAD]), [(1, 4, 4)], [1.0], config("qwen2_5_vl"))


def test_agrees_with_transformers_while_space_spans_more_than_time(tiny) -> None:
    """transformers continues after max(h, w) // merge: the same as max + 1 for Qwen3-VL, and for short videos."""
    prompt, model = tiny.prompt((2, 6, 8), second_per_grid=1.0), tiny.model()
    grid = torch.tensor([prompt.video.grid_thw])
    types = (prompt.input_ids == model.config.video_token_id).int() * 2
    expected, deltas = model.model.get_rope_index(
        prompt.input_ids[None], types[None], video_grid_thw=grid, second_per_grid_ts=torch.tensor([1.0])
    )
    positions, next_position = mrope_positions(prompt.input_ids, [prompt.video.grid_thw], [1.0], model.config)
    assert torch.equal(positions, expected[:, 0])
    assert next_position == len(prompt.input_ids) + int(deltas)

"""Each known trap, put back on purpose, is seen by the comparison with the plain model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AttentionMaskInterface

from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning.loss import RowTargets, log_probs, policy_loss
from tempsamp_fast.model.attention import TEXT_ATTENTION
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.model.packing import PackedRow, PackingMode, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.split_attention import attend_windows

VISIBLE = 1e-3
"""Far above the 2e-5 that exactness tests allow."""


def packed_error(oracle, tiny, change: Callable[[PackedRow], PackedRow] = lambda row: row, **options) -> float:
    """Relative error of packed logits when `change` is applied to the row."""
    groups = tiny.groups()
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    with torch.no_grad():
        logits = oracle.packed_logits(Policy(tiny.model(), **options), [change(row)])
        return oracle.error(logits, oracle.plain_logits(tiny.model(), groups))


def test_without_a_trap_there_is_no_error(oracle, tiny) -> None:
    assert packed_error(oracle, tiny) < oracle.rtol


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_text_after_a_video_by_its_height_and_width(oracle, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own positions since 5.3: start + max(h, w) // 2 where the checkpoints continue at max + 1."""
    model = tiny.model().model

    def transformers_positions(input_ids, grids, seconds_per_grid, config):
        types = (input_ids == config.video_token_id).int() * 2
        seconds = torch.tensor(seconds_per_grid)
        positions, _ = model.get_rope_index(
            input_ids[None], types[None], video_grid_thw=torch.tensor(grids), second_per_grid_ts=seconds
        )
        return positions[:, 0], int(positions[:, 0, -1].max()) + 1

    monkeypatch.setattr("tempsamp_fast.model.segments.mrope_positions", transformers_positions)
    assert packed_error(oracle, tiny) > VISIBLE


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("seconds", [0.0, 1.0], ids=["one_time_for_all_frames", "second_per_grid_missing"])
def test_wrong_clock(oracle, tiny, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_clock(input_ids, grids, seconds_per_grid, config):
        return mrope_positions(input_ids, grids, [seconds] * len(grids), config)

    monkeypatch.setattr("tempsamp_fast.model.segments.mrope_positions", wrong_clock)
    assert packed_error(oracle, tiny) > VISIBLE


def test_branches_that_do_not_restart_after_the_prompt(oracle, tiny) -> None:
    def counted_through(row: PackedRow) -> PackedRow:
        return replace(row, position_ids=torch.arange(row.num_tokens).expand(3, 1, -1))

    assert packed_error(oracle, tiny, counted_through) > VISIBLE


def test_four_axis_positions(oracle, tiny) -> None:
    """A fourth, text axis makes transformers build its own mask of packed sequences."""

    def with_text_axis(row: PackedRow) -> PackedRow:
        return replace(row, position_ids=torch.cat([row.position_ids[:1], row.position_ids]))

    with pytest.raises(AssertionError, match="carries its own mask"):
        packed_error(oracle, tiny, with_text_axis)


def test_stock_attention_lets_branches_see_each_other(oracle, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = lambda model: model.set_attn_implementation("sdpa")
    monkeypatch.setattr("tempsamp_fast.model.policy.use_packed_attention", stock)
    assert packed_error(oracle, tiny) > VISIBLE


def test_branches_aligned_to_the_upper_left(oracle, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `is_causal=True` means for fewer queries than keys: branches would miss most of their prompt."""

    def upper_left(prompt_len: int, branch_lens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        num_branch = int(branch_lens.sum())
        visible = torch.ones(num_branch, prompt_len + num_branch, dtype=torch.bool).tril()
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))

    monkeypatch.setattr("tempsamp_fast.model.split_attention._branch_mask", upper_left)
    assert packed_error(oracle, tiny) > VISIBLE


def test_labels_shifted_across_branch_borders(oracle, tiny) -> None:
    """A plain shift predicts a branch's first token from the end of the branch before it."""

    def shifted(row: PackedRow) -> PackedRow:
        starts = torch.tensor([0] + [group.num_tokens for group in row.layout]).cumsum(0).tolist()
        bounds = [
            (start + group.prompt_len, start + group.num_tokens)
            for start, group in zip(starts[:-1], row.layout, strict=True)
        ]
        return replace(row, logit_indices=torch.cat([torch.arange(first - 1, stop - 1) for first, stop in bounds]))

    assert packed_error(oracle, tiny, shifted) > VISIBLE


def test_without_a_mask_function_the_padding_of_a_plain_forward_is_dropped(
    oracle, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = {
        "input_ids": torch.arange(24).reshape(2, 12),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
        "position_ids": torch.arange(12).expand(3, 2, -1),
    }
    plain, prepared = tiny.model(), Policy(tiny.model()).base_model
    monkeypatch.delitem(AttentionMaskInterface._global_mapping, TEXT_ATTENTION)
    with torch.no_grad():
        assert oracle.error(prepared(**padded).logits[0, 3:], plain(**padded).logits[0, 3:]) > VISIBLE


def test_a_text_attention_named_flash_would_take_flash_only_branches() -> None:
    assert "flash" not in TEXT_ATTENTION


def test_the_vision_tower_attends_once_per_block_and_window_size(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name without "flash", transformers would call once per window, in a Python loop."""
    calls = []
    spy = lambda *arguments: calls.append(1) or attend_windows(*arguments)
    monkeypatch.setattr("tempsamp_fast.model.attention.attend_windows", spy)
    (row,) = pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)
    policy = Policy(tiny.model())
    policy.encode_videos(row.pixel_values, row.video_grid_thw)
    assert len(calls) == len(policy.base_model.model.visual.blocks)


def test_checkpointing_keeps_the_layout(oracle, tiny) -> None:
    """transformers' checkpointing drops caches, not the layout that packed attention needs."""
    groups = tiny.groups()
    rows = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    policies = [Policy(tiny.model(), gradient_checkpointing=enabled) for enabled in (False, True)]
    plain, checkpointed = (oracle.packed_pass(policy, rows) for policy in policies)
    oracle.assert_same(checkpointed, plain)


def test_every_submodule_runs_inside_the_forward_of_the_policy(tiny) -> None:
    """An engine that gathers parameters around the outermost forward (ZeRO-3) sees every use."""
    policy = Policy(tiny.model())
    depth, outside = [], []

    def note(module: nn.Module, _: object) -> None:
        if not depth:
            outside.append(type(module).__name__)

    policy.register_forward_pre_hook(lambda *_: depth.append(1))
    policy.register_forward_hook(lambda *_: depth.clear())
    for module in policy.base_model.modules():
        module.register_forward_pre_hook(note)
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    policy(row, torch.nn.functional.linear)
    assert outside == []
    policy.encode_videos(row.pixel_values, row.video_grid_thw)
    assert outside != []


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_bf16_log_probs_of_other_rows_than_the_loss(tiny) -> None:
    """A policy would differ from itself by 1e-2 if its old or reference log-probs came from a row per answer."""
    policy, algorithm = Policy(tiny.model().bfloat16()), AlgorithmConfig(beta=0.04)

    def logps(max_tokens_per_row: int, mode: PackingMode) -> torch.Tensor:
        rows = pack(tiny.groups(), config=policy.config, max_tokens_per_row=max_tokens_per_row, mode=mode)
        return torch.cat([policy(row, log_probs(row, algorithm, 1.0)) for row in rows])

    def metrics(compared_with: torch.Tensor) -> dict[str, float]:
        (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
        on_policy = torch.zeros(row.num_completions, dtype=torch.bool)
        targets = RowTargets(torch.ones(row.num_completions), on_policy, compared_with, compared_with)
        return policy(row, policy_loss(row, targets, "grpo", algorithm, 1.0, 1.0, 1.0, 1))[1].as_dict()

    own, separate = metrics(logps(10_000, "shared_prefix")), metrics(logps(50, "none"))
    assert (own["kl"], own["ratio_min"], own["ratio_max"]) == (0.0, 1.0, 1.0)
    assert separate["kl"] > 1e-6 and separate["ratio_max"] > 1 + VISIBLE

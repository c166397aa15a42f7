"""The layout of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempsamp_fast.batch import VisionFeatures
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.packing import pack, pack_prompts


def test_logit_indices_are_the_tokens_before_the_answers(tiny) -> None:
    """Where the predicted token is the k-th of its answer, its logits come from the prompt's end or the token k - 1."""
    groups = tiny.groups()
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    ids, start, expected = row.input_ids[0].tolist(), 0, []
    for group in groups:
        last = branch = start + len(group.prompt.input_ids) - 1
        for completion in group.completions:
            expected += [last, *range(branch + 1, branch + len(completion.ids))]
            assert ids[branch + 1 : branch + 1 + len(completion.ids)] == completion.ids.tolist()
            branch += len(completion.ids)
        start = branch + 1
    assert row.logit_indices.tolist() == expected
    assert start == row.num_tokens


def test_row_ids_count_answers_within_the_row(tiny) -> None:
    groups = tiny.groups()
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    lengths = [len(completion.ids) for group in groups for completion in group.completions]
    assert row.num_completions == len(lengths)
    assert torch.bincount(row.row_ids).tolist() == lengths
    assert row.row_ids.tolist() == sorted(row.row_ids.tolist())


@pytest.mark.parametrize("mode", ["shared_prefix", "none"])
@pytest.mark.parametrize("num_in_first_row", [1, 2, 3])
@pytest.mark.parametrize("num_lacking", [0, 1])
def test_rows_are_filled_in_order_to_the_last_token(tiny, mode: str, num_in_first_row: int, num_lacking: int) -> None:
    """With prompts, their answers and their videos; what lacks room for one token begins the next row."""
    groups = tiny.groups()
    wholes = [
        (group.prompt, answers)
        for group in groups
        for ids in [[completion.ids for completion in group.completions]]
        for answers in ([ids] if mode == "shared_prefix" else [[each] for each in ids])
    ]
    lengths = [len(prompt.input_ids) + sum(map(len, answers)) for prompt, answers in wholes]
    budget = sum(lengths[:num_in_first_row]) - num_lacking
    expected, free = [], 0
    for whole, length in zip(wholes, lengths, strict=True):
        if not expected or free < length:
            expected.append([])
            free = budget
        expected[-1].append(whole)
        free -= length
    rows = pack(groups, config=tiny.model().config, mode=mode, max_tokens_per_row=budget)
    for row, content in zip(rows, expected, strict=True):
        ids = torch.cat([torch.cat([prompt.input_ids, *answers]) for prompt, answers in content])
        assert torch.equal(row.input_ids[0], ids)
        assert torch.equal(row.token_ids, torch.cat([ids for _, answers in content for ids in answers]))
        assert torch.equal(row.pixel_values, torch.cat([prompt.video.pixel_values for prompt, _ in content]))


def test_a_group_longer_than_a_row_is_named(tiny) -> None:
    with pytest.raises(ValueError, match=r"sample-1.*max_tokens_per_row=20"):
        pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=20)


def test_videos_without_features_beside_others_with_them_are_refused(tiny) -> None:
    first, *others = tiny.groups()
    encoded = replace(first.prompt.video, features=VisionFeatures(torch.zeros(6, 4), ()))
    groups = [replace(first, prompt=replace(first.prompt, video=encoded)), *others]
    with pytest.raises(ValueError, match=r"2 of a row's 3 videos lack their features"):
        pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)


def test_an_empty_answer_is_named(tiny) -> None:
    group = tiny.group(tiny.prompt((2, 4, 4), seed=7), [3, 0])
    with pytest.raises(ValueError, match="sample-7"):
        pack([group], config=tiny.model().config, max_tokens_per_row=1000)


def test_an_unknown_mode_is_refused_with_the_choices(tiny) -> None:
    with pytest.raises(ValueError, match=r"'prefix'.*shared_prefix or none"):
        pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=1000, mode="prefix")


def test_prompts_alone_are_rows_whose_last_tokens_are_wanted(tiny) -> None:
    prompts = [group.prompt for group in tiny.groups()]
    (row,) = pack_prompts(prompts, config=tiny.model().config, max_tokens_per_row=10_000)
    ends = torch.tensor([len(prompt.input_ids) for prompt in prompts]).cumsum(0) - 1
    assert torch.equal(row.logit_indices, ends)
    assert row.layout == tuple(GroupLayout(len(prompt.input_ids), ()) for prompt in prompts)
    assert len(row.token_ids) == row.num_completions == 0


def test_moving_a_row_moves_every_tensor_but_the_grids(tiny) -> None:
    """Which only the CPU reads."""
    (row,) = pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)
    moved = row.to("meta")
    devices = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert devices.pop("video_grid_thw") == "cpu" and set(devices.values()) == {"meta"}
    assert moved.layout == row.layout

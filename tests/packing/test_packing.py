"""The layout of rows."""

from __future__ import annotations

import pytest
import torch

from tempsamp_fast.model.packing import GroupLayout, pack, pack_prompts


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
@pytest.mark.parametrize("max_tokens_per_row", [80, 120, 10_000])
def test_rows_keep_the_order_and_the_budget(tiny, mode: str, max_tokens_per_row: int) -> None:
    groups = tiny.groups()
    rows = pack(groups, config=tiny.model().config, mode=mode, max_tokens_per_row=max_tokens_per_row)
    answers = torch.cat([completion.ids for group in groups for completion in group.completions])
    assert torch.equal(torch.cat([row.token_ids for row in rows]), answers)
    assert all(row.num_tokens <= max_tokens_per_row for row in rows)
    copies = [1, 1, 1] if mode == "shared_prefix" else [3, 1, 4]
    patches = sum(n * len(group.prompt.video.pixel_values) for n, group in zip(copies, groups, strict=True))
    assert sum(len(row.pixel_values) for row in rows) == patches


def test_a_group_longer_than_a_row_is_named(tiny) -> None:
    with pytest.raises(ValueError, match=r"sample-1.*max_tokens_per_row=20"):
        pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=20)


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


def test_moving_a_row_moves_every_tensor(tiny) -> None:
    (row,) = pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)
    moved = row.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.layout == row.layout

"""Several questions about one video as a tree: what they share once, with the gradients of separate rows."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.model import segments
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.packing import pack, pack_prompts
from tempsamp_fast.model.policy import Policy

every_family = pytest.mark.parametrize("tiny", FAMILIES, indirect=True)


def test_what_prompts_share_is_there_once(tiny) -> None:
    """Videos, tokens and answers; the order of answers stays that of the groups."""
    groups = tiny.tree_groups()
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    assert [len(tree.nodes) for tree in row.layout] == [1 + 3 + 6, 1 + 2, 1 + 2 + 4]
    assert row.video_grid_thw.tolist() == [[3, 6, 4], [2, 4, 4], [5, 2, 6]]
    answers = [completion.ids for group in groups for completion in group.completions]
    assert torch.equal(row.token_ids, torch.cat(answers))
    assert torch.bincount(row.row_ids).tolist() == list(map(len, answers))
    alone = sum(group.num_tokens for group in groups)
    common = [len(groups[0].prompt.input_ids) - 3, len(groups[4].prompt.input_ids) - 1]
    assert [row.layout[0].prompt_len, row.layout[2].prompt_len] == common
    assert row.num_tokens == alone - 2 * common[0] - common[1]
    assert segments.num_tree_tokens(groups[:3], tiny.model().config) == row.layout[0].num_tokens


def test_questions_join_a_tree_that_fits_to_the_last_token(tiny) -> None:
    groups, config = tiny.tree_groups()[:3], tiny.model().config
    branches = [(group.prompt, [completion.ids for completion in group.completions]) for group in groups]
    two = segments.num_tree_tokens(groups[:2], config)
    of_two, of_less = ([len(tree.prompts) for tree in segments.segments(branches, config, n)] for n in (two, two - 1))
    assert of_two == [2, 1] and of_less[0] == 1


@every_family
@pytest.mark.parametrize(
    ("max_tokens_per_row", "gradient_checkpointing"), [(70, True), (10_000, False)], ids=["row_per_tree", "one_row"]
)
def test_trees_equal_separate_rows(exact, tiny, max_tokens_per_row: int, gradient_checkpointing: bool) -> None:
    """Logits, loss and the gradient of every parameter, the tower's included."""
    groups = tiny.tree_groups()
    model = exact.model(tiny)
    rows = pack(groups, config=model.config, max_tokens_per_row=max_tokens_per_row)
    policy = Policy(model, gradient_checkpointing=gradient_checkpointing)
    exact.assert_same(exact.packed_pass(policy, rows), exact.plain_pass(tiny, groups))


def long_tree(tiny) -> list[RolloutGroup]:
    """Four questions, one of two tokens, that fit no row together, and a group of another video behind them."""
    questions = [[7, *range(1, 19)], [5, *range(21, 40)], [7, 5], [9, *range(11, 36)]]
    prompts = tiny.about(tiny.prompt((3, 6, 4), seed=1), questions)
    lengths = [[9, 1], [20, 3], [4], [1, 1, 30]]
    pairs = zip(prompts, lengths, strict=True)
    groups = [tiny.group(prompt, of_prompt, seed=seed) for seed, (prompt, of_prompt) in enumerate(pairs)]
    return [*groups, tiny.groups()[1]]


@every_family
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_tree_longer_than_a_row_runs_in_stages_with_the_same_gradients(
    exact, tiny, gradient_checkpointing: bool
) -> None:
    """The video, questions in turn and answers in turn: each of them once, whatever continues it and when."""
    groups, model = long_tree(tiny), exact.model(tiny)
    rows = pack(groups, config=model.config, max_tokens_per_row=60)
    assert rows[0].stages[:3] == (1, 3, 1) and len(rows[0].stages) > 4 and rows[1].stages == ()
    assert sum(rows[0].stages) == len(rows[0].layout[0].nodes)
    policy = Policy(model, gradient_checkpointing=gradient_checkpointing)
    exact.assert_same(exact.packed_pass(policy, rows), exact.plain_pass(tiny, groups))


def test_prompts_alone_are_trees_whose_last_tokens_are_wanted(tiny) -> None:
    prompts = [group.prompt for group in tiny.tree_groups()]
    (row,) = pack_prompts(prompts, config=tiny.model().config, max_tokens_per_row=10_000)
    ends = [int(row.input_ids[0, index]) for index in row.logit_indices]
    assert ends == [int(prompt.input_ids[-1]) for prompt in prompts]
    assert [len(tree.nodes) for tree in row.layout] == [4, 1, 3]


def test_without_packing_every_answer_has_its_own_video(tiny) -> None:
    groups = tiny.tree_groups()
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000, mode="none")
    assert len(row.video_grid_thw) == row.num_completions == sum(len(group.completions) for group in groups)


def test_text_before_the_video_keeps_questions_apart(tiny, caplog: pytest.LogCaptureFixture) -> None:
    """And that is said once."""
    segments._tell_text_first.cache_clear()
    prompts = tiny.about(tiny.prompt((3, 6, 4), seed=1), [[7, 8], [7, 5]])
    other = replace(prompts[1], input_ids=torch.cat([torch.tensor([9]), prompts[1].input_ids[1:]]))
    groups = [tiny.group(prompt, [2, 3]) for prompt in (prompts[0], other, prompts[0])]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    assert [len(tree.nodes) for tree in row.layout] == [3, 3, 3]
    assert caplog.text.count("differ before it") == 1


def test_the_same_question_twice_keeps_a_token_of_its_own(oracle, tiny) -> None:
    """Two answers' worth of one prompt, as a replaced sample may bring."""
    prompt = tiny.about(tiny.prompt((3, 6, 4), seed=1), [[7, 8, 9]])[0]
    groups = [tiny.group(prompt, [2, 3], seed=1), tiny.group(prompt, [4], seed=2)]
    (row,) = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    assert row.layout[0].prompt_len == len(prompt.input_ids) - 1
    oracle.assert_close(oracle.packed_logits(Policy(tiny.model()), [row]), oracle.plain_logits(tiny.model(), groups))


def test_answers_that_see_another_question_are_noticed(exact, tiny) -> None:
    """The gate itself: a tree flattened into one fork is seen."""
    groups = tiny.tree_groups()[:3]
    model = exact.model(tiny)
    (row,) = pack(groups, config=model.config, max_tokens_per_row=10_000)
    (tree,) = row.layout
    flat = replace(tree, parents=tuple(1 if parent else 0 for parent in tree.parents))
    logits = exact.packed_logits(Policy(model), [replace(row, layout=(flat,))])
    assert exact.error(logits, exact.plain_logits(exact.model(tiny), groups)) > 1e-3

"""The law of packing: logits, loss and every gradient equal those of separate rows of the plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.packing import PackingMode, pack
from tempsamp_fast.model.policy import Policy

every_family = pytest.mark.parametrize("tiny", FAMILIES, indirect=True)


@every_family
@pytest.mark.parametrize(
    ("mode", "max_tokens_per_row", "gradient_checkpointing"),
    [("shared_prefix", 10_000, False), ("shared_prefix", 240, True), ("none", 10_000, True)],
    ids=["one_row", "row_per_group_checkpointed", "row_per_answer"],
)
def test_packed_equals_plain(
    exact, tiny, mode: PackingMode, max_tokens_per_row: int, gradient_checkpointing: bool
) -> None:
    """To rounding in float64, of every family: logits, loss and every gradient, the vision tower's included."""
    model = exact.model(tiny)
    rows = pack(exact.groups(tiny), config=model.config, mode=mode, max_tokens_per_row=max_tokens_per_row)
    policy = Policy(model, gradient_checkpointing=gradient_checkpointing)
    exact.assert_same(exact.packed_pass(policy, rows), exact.expected(tiny.family))


@every_family
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_group_longer_than_a_row_runs_in_stages_with_the_same_gradients(
    exact, tiny, gradient_checkpointing: bool
) -> None:
    """The prompt's keys and values, or its states, collect the gradients of every chunk of answers."""
    groups = [tiny.group(tiny.prompt((3, 6, 4), seed=1), [20, 15, 1, 9, 12]), tiny.groups()[1]]
    model = exact.model(tiny)
    rows = pack(groups, config=model.config, max_tokens_per_row=40)
    assert [row.stages for row in rows] == [(1, 3, 2), ()]
    policy = Policy(model, gradient_checkpointing=gradient_checkpointing)
    exact.assert_same(exact.packed_pass(policy, rows), exact.plain_pass(tiny, groups))


def test_branches_in_several_blocks_equal_one(exact, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many branches share an attention call changes nothing."""
    model = exact.model(tiny)
    rows = pack(exact.groups(tiny), config=model.config, max_tokens_per_row=10_000)
    monkeypatch.setattr("tempsamp_fast.model.split_attention.BRANCH_BLOCK", 5)
    exact.assert_same(exact.packed_pass(Policy(model), rows), exact.expected(tiny.family))


@pytest.mark.parametrize(
    ("options", "recomputed"),
    [
        ({}, {"layers": [], "blocks": []}),
        ({"gradient_checkpointing": True}, {"layers": [0, 1, 2], "blocks": [0, 1]}),
        ({"gradient_checkpointing": True, "checkpoint_every": 2}, {"layers": [0, 2], "blocks": [0, 1]}),
        ({"gradient_checkpointing": True, "checkpoint_vision": False}, {"layers": [0, 1, 2], "blocks": []}),
    ],
)
def test_checkpointed_layers_run_again_in_the_backward_pass(tiny, options: dict, recomputed: dict) -> None:
    policy = Policy(tiny.model(), **options).train()
    modules = {"layers": policy.base_model.model.language_model.layers, "blocks": policy.base_model.model.visual.blocks}
    calls = {name: [0] * len(modules[name]) for name in modules}
    for name, layers in modules.items():
        for index, layer in enumerate(layers):
            count = lambda *_, name=name, index=index: calls[name].__setitem__(index, calls[name][index] + 1)
            layer.mlp.register_forward_pre_hook(count)
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    policy(row).sum().backward()
    assert {name: [i for i, n in enumerate(counts) if n == 2] for name, counts in calls.items()} == recomputed


def test_features_at_hand_replace_the_tower(oracle, tiny) -> None:
    """A frozen tower's features, computed once, give the same logits as the pixels, without running it again."""
    model, groups = tiny.model(), tiny.groups()
    model.model.visual.requires_grad_(False)
    policy = Policy(model)
    expected = oracle.packed_logits(policy, pack(groups, config=policy.config, max_tokens_per_row=10_000))
    prompts = with_vision_features(policy, [group.prompt for group in groups])
    encoded = [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)]
    (row,) = pack(encoded, config=policy.config, max_tokens_per_row=10_000)
    assert len(row.pixel_values) == 0 and not row.vision.embeds.requires_grad
    model.model.visual.register_forward_hook(lambda *_: pytest.fail("the tower ran although features were given"))
    oracle.assert_close(oracle.packed_logits(policy, [row]), expected)
    assert with_vision_features(policy, prompts)[0].video.features is prompts[0].video.features


def test_features_of_a_trained_tower_are_not_kept(tiny) -> None:
    with pytest.raises(ValueError, match="frozen"):
        with_vision_features(Policy(tiny.model()), [tiny.prompt((2, 4, 4))])


def test_the_prepared_model_still_runs_plainly(oracle, tiny) -> None:
    """Registering the attention changes nothing for plain forwards, padding masks included."""
    plain, prepared = tiny.model(), Policy(tiny.model()).base_model
    prompt = tiny.prompt((2, 4, 4))
    padded = {
        "input_ids": torch.stack([prompt.input_ids, prompt.input_ids.roll(3)])[:, :12] % 60,
        "attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
        "position_ids": torch.arange(12).expand(3, 2, -1),
    }
    oracle.assert_close(prepared(**padded).logits, plain(**padded).logits)
    video = {"pixel_values_videos": prompt.video.pixel_values, "video_grid_thw": torch.tensor([[2, 4, 4]])}
    ids = {"input_ids": prompt.input_ids[None], "position_ids": torch.arange(len(prompt.input_ids)).expand(3, 1, -1)}
    oracle.assert_close(prepared(**video, **ids).logits, plain(**video, **ids).logits)

"""What a policy does with its settings and with what a video's features carry."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear
from transformers import Qwen3VLForConditionalGeneration

from tempsamp_fast.model import policy as policy_module
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy


@pytest.mark.parametrize("in_stages", [False, True])
def test_every_pass_attends_by_the_core_of_the_policy(tiny, in_stages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention runs on the CPU where no gradient is needed."""
    cores, packed_attention = [], policy_module.packed_attention
    note = lambda *args, core, **options: cores.append(core) or packed_attention(*args, core=core, **options)
    monkeypatch.setattr(policy_module, "packed_attention", note)
    policy = Policy(tiny.model(), attention_core="flex")
    group = tiny.groups()[0]
    budget = len(group.prompt.input_ids) if in_stages else group.num_tokens
    (row,) = pack([group], config=policy.config, max_tokens_per_row=budget)
    assert bool(row.stages) == in_stages
    with torch.no_grad():
        policy(row, linear)
    assert set(cores) == {"flex"}


@pytest.mark.parametrize("tiny", ["qwen3_vl"], indirect=True)
def test_several_deepstack_features_go_to_their_own_layers(oracle, tiny) -> None:
    config = tiny.model().config
    config.vision_config.deepstack_visual_indexes = [0, 1]
    torch.manual_seed(0)
    model, groups = Qwen3VLForConditionalGeneration(config), tiny.groups()
    rows = pack(groups, config=config, max_tokens_per_row=10_000)
    with torch.no_grad():
        expected = oracle.plain_logits(model, groups)
        oracle.assert_close(oracle.packed_logits(Policy(model), rows), expected)


def test_a_tower_that_is_trained_in_part_is_trained(tiny) -> None:
    model = tiny.model()
    model.model.visual.requires_grad_(False)
    trained = next(iter(model.model.visual.blocks.parameters())).requires_grad_()
    policy = Policy(model)
    assert not policy.has_frozen_tower
    (row,) = pack(tiny.groups()[:1], config=policy.config, max_tokens_per_row=10_000)
    policy(row, linear).square().sum().backward()
    assert trained.grad is not None and trained.grad.abs().max() > 0


def test_two_answers_to_a_prompt_do_not_see_each_other(oracle, tiny) -> None:
    """The smallest group that has branches."""
    groups = [tiny.group(tiny.prompt((2, 4, 4), seed=3), [3, 2], seed=4)]
    rows = pack(groups, config=tiny.model().config, max_tokens_per_row=10_000)
    with torch.no_grad():
        packed = oracle.packed_logits(Policy(tiny.model()), rows)
        oracle.assert_close(packed, oracle.plain_logits(tiny.model(), groups))

"""The law of packing: logits, loss and every gradient equal those of separate rows of the plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.mrope import mrope_positions
from tempsamp_fast.packing import PackedRow, pack
from tempsamp_fast.policy import Policy, with_vision_features

RTOL = 2e-5


def assert_close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
    assert error < RTOL, f"{name}: relative error {error:.1e}"


def logits_head(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def loss_of(logits: Tensor, token_ids: Tensor, weights: Tensor) -> Tensor:
    return -(weights * logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]).sum()


def token_weights(num_tokens: int) -> Tensor:
    """A different weight, of either sign, for every predicted token."""
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(5))


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def plain_logits(model: PreTrainedModel, groups: list[RolloutGroup]) -> Tensor:
    """transformers' own forward, one row per answer, positions explicit; [M, vocab] in packing order."""
    pieces = []
    for group in groups:
        video = group.prompt.video
        positions, start = mrope_positions(
            group.prompt.input_ids, [video.grid_thw], [video.second_per_grid], model.config
        )
        for completion in group.completions:
            length = len(completion.ids)
            answer_positions = torch.arange(start, start + length).expand(3, -1)
            logits = model(
                input_ids=torch.cat([group.prompt.input_ids, completion.ids])[None],
                position_ids=torch.cat([positions, answer_positions], dim=1)[:, None],
                pixel_values_videos=video.pixel_values,
                video_grid_thw=torch.tensor([video.grid_thw]),
                use_cache=False,
            ).logits
            pieces.append(logits[0, -length - 1 : -1])
    return torch.cat(pieces)


def plain_run(tiny, groups: list[RolloutGroup]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = tiny.model()
    logits = plain_logits(model, groups)
    token_ids = torch.cat([completion.ids for group in groups for completion in group.completions])
    loss = loss_of(logits, token_ids, token_weights(len(token_ids)))
    loss.backward()
    return logits.detach(), loss.detach(), gradients(model)


def packed_run(tiny, rows: list[PackedRow], **options) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    policy = Policy(tiny.model(), **options).train()
    logits = torch.cat([policy(row, logits_head) for row in rows])
    token_ids = torch.cat([row.token_ids for row in rows])
    loss = loss_of(logits, token_ids, token_weights(len(token_ids)))
    loss.backward()
    return logits.detach(), loss.detach(), gradients(policy.base_model)


@pytest.mark.parametrize("mode", ["shared_prefix", "none"])
@pytest.mark.parametrize("max_tokens_per_row", [80, 10_000], ids=["row_per_group", "one_row"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_packed_equals_plain(tiny, mode: str, max_tokens_per_row: int, gradient_checkpointing: bool) -> None:
    groups = tiny.groups()
    rows = pack(groups, config=tiny.model().config, mode=mode, max_tokens_per_row=max_tokens_per_row)
    logits, loss, grads = packed_run(tiny, rows, gradient_checkpointing=gradient_checkpointing)
    plain = plain_run(tiny, groups)
    assert_close(logits, plain[0], "logits")
    assert_close(loss, plain[1], "loss")
    assert grads.keys() == plain[2].keys()
    for name, gradient in grads.items():
        assert plain[2][name] is not None and plain[2][name].abs().max() > 0, f"{name} is not exercised"
        assert_close(gradient, plain[2][name], name)


def test_checkpointing_recomputes_decoder_layers_and_vision_blocks(tiny) -> None:
    """The switch acts: each checkpointed layer runs a second time in the backward pass."""
    policy = Policy(tiny.model(), gradient_checkpointing=True).train()
    calls = []
    for module in (policy.base_model.model.language_model.layers[0].mlp, policy.base_model.model.visual.blocks[0].mlp):
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    policy(row).sum().backward()
    assert len(calls) == 4


def test_branches_in_several_blocks_equal_one(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many branches share an attention call changes nothing."""
    rows = pack(tiny.groups(), config=tiny.model().config, max_tokens_per_row=10_000)
    expected = packed_run(tiny, rows)
    monkeypatch.setattr("tempsamp_fast.split_attention.BRANCH_BLOCK", 5)
    logits, _, grads = packed_run(tiny, rows)
    assert_close(logits, expected[0], "logits")
    for name, gradient in grads.items():
        assert_close(gradient, expected[2][name], name)


def test_features_at_hand_replace_the_tower(tiny) -> None:
    """A frozen tower's features, computed once, give the same logits as the pixels, without running it again."""
    model, groups = tiny.model(), tiny.groups()
    model.model.visual.requires_grad_(False)
    policy = Policy(model)
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)
    expected = policy(row, logits_head)
    prompts = with_vision_features(policy, [group.prompt for group in groups])
    encoded = [replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)]
    (row,) = pack(encoded, config=policy.config, max_tokens_per_row=10_000)
    assert len(row.pixel_values) == 0 and not row.vision.embeds.requires_grad
    model.model.visual.register_forward_hook(lambda *_: pytest.fail("the tower ran although features were given"))
    assert_close(policy(row, logits_head), expected)
    assert with_vision_features(policy, prompts)[0].video.features is prompts[0].video.features


def test_features_of_a_trained_tower_are_not_kept(tiny) -> None:
    with pytest.raises(ValueError, match="frozen"):
        with_vision_features(Policy(tiny.model()), [tiny.prompt((2, 4, 4))])


def test_the_prepared_model_still_runs_plainly(tiny) -> None:
    """Registering the attention changes nothing for plain forwards, padding masks included."""
    plain, prepared = tiny.model(), Policy(tiny.model()).base_model
    prompt = tiny.prompt((2, 4, 4))
    padded = {
        "input_ids": torch.stack([prompt.input_ids, prompt.input_ids.roll(3)])[:, :12] % 60,
        "attention_mask": torch.tensor([[0] * 3 + [1] * 9, [1] * 12]),
        "position_ids": torch.arange(12).expand(3, 2, -1),
    }
    assert_close(prepared(**padded).logits, plain(**padded).logits)
    video = {"pixel_values_videos": prompt.video.pixel_values, "video_grid_thw": torch.tensor([[2, 4, 4]])}
    ids = {"input_ids": prompt.input_ids[None], "position_ids": torch.arange(len(prompt.input_ids)).expand(3, 1, -1)}
    assert_close(prepared(**video, **ids).logits, plain(**video, **ids).logits)

"""The trainer's loss on heads that are no plain trained matrix: tied, frozen under LoRA adapters, under autocast."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss
from tempsamp_kernels import head as kernel_head
from tempsamp_kernels.head import ROW_MULTIPLE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tempsamp_fast.config import AlgorithmConfig
from tempsamp_fast.learning import loss as loss_module
from tempsamp_fast.learning.loss import RowTargets, idle_loss, log_probs, policy_loss, row_targets
from tempsamp_fast.model.packing import PackedRow, idle_row, pack
from tempsamp_fast.model.policy import Policy

NUM_ANSWERS = 8
ADVANTAGES = torch.linspace(-1, 2, NUM_ANSWERS)


def one_row(tiny: Any, policy: Policy) -> PackedRow:
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    assert row.num_completions == NUM_ANSWERS
    return row


def test_rows_have_the_targets_of_their_own_answers(tiny) -> None:
    """Groups of several sizes, several rows; of every answer whether it is the true one and whether it counts."""
    groups = tiny.groups()
    sizes = [len(group.completions) for group in groups]
    assert len(set(sizes)) > 1
    flags = torch.arange(NUM_ANSWERS)
    is_true, is_cut = flags % 3 == 1, flags % 4 == 0
    answers = iter(zip(is_true.tolist(), is_cut.tolist(), strict=True))
    for group, advantages in zip(groups, ADVANTAGES.split(sizes), strict=True):
        group.advantages = advantages
        for completion in group.completions:
            completion.is_off_policy, completion.is_cut = next(answers)
    rows = pack(groups, config=tiny.model().config, max_tokens_per_row=max(group.num_tokens for group in groups))
    assert len(rows) > 1
    old, ref = ([torch.full((len(row.token_ids),), n + i) for i, row in enumerate(rows)] for n in (0.0, 9.0))
    for masks, expected in ((False, None), (True, ~is_cut)):
        found = row_targets(rows, groups, old, ref, AlgorithmConfig(mask_truncated_completions=masks))
        assert torch.equal(torch.cat([each.advantages for each in found]), ADVANTAGES)
        assert torch.equal(torch.cat([each.is_off_policy for each in found]), is_true)
        assert [(each.old_logps, each.ref_logps) for each in found] == list(zip(old, ref, strict=True))
        if expected is None:
            assert all(each.row_mask is None for each in found)
        else:
            assert torch.equal(torch.cat([each.row_mask for each in found]), expected)


def tied(tiny: Any) -> Policy:
    """Everything is trained, and the head is the embedding."""
    return Policy(tiny.model())


def lora(tiny: Any) -> Policy:
    """Random adapters in attention; everything else is frozen, the head too."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return Policy(peft.get_peft_model(tiny.model(), adapter))


def fused(row: PackedRow, impl: Literal["auto", "torch", "triton"] = "torch") -> Any:
    targets = RowTargets(ADVANTAGES, torch.zeros(NUM_ANSWERS, dtype=torch.bool))
    return policy_loss(row, targets, "grpo", AlgorithmConfig(loss_impl=impl), 1.0, NUM_ANSWERS, len(row.token_ids), 16)


def plain(row: PackedRow) -> Any:
    """The same loss by autograd over full logits."""

    def head(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
        logps = torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, row.token_ids[:, None])[:, 0]
        lengths = row.row_ids.bincount()[row.row_ids]
        ratio = torch.exp(logps - logps.detach())
        return -(ratio * ADVANTAGES[row.row_ids] / lengths).sum() / NUM_ANSWERS, None

    return head


def gradients(policy: Policy, row: PackedRow, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter that has one."""
    policy.zero_grad()
    loss, _ = policy(row, head)
    loss.backward()
    found = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    return loss.detach(), {name: gradient.clone() for name, gradient in found.items()}


ONE_FAMILY = pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
"""For what a kernel makes of a row, whoever made the row."""


@ONE_FAMILY
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("build", [tied, lora])
def test_every_gradient_is_that_of_autograd_over_full_logits(tiny, build, impl: Literal["torch", "triton"]) -> None:
    """The embedding, which is also the head, collects both of its gradients; under LoRA only adapters have any."""
    policy = build(tiny)
    row = one_row(tiny, policy)
    loss, found = gradients(policy, row, fused(row, impl))
    expected_loss, expected = gradients(policy, row, plain(row))
    torch.testing.assert_close(loss, expected_loss)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found) == (build is lora)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert max(float(gradient.norm()) for gradient in expected.values()) > 1e-3


def test_a_frozen_head_costs_two_thirds_of_a_trained_one(tiny) -> None:
    """4NHV FLOPs instead of 6NHV."""

    def head_flops(policy: Policy) -> int:
        row = one_row(tiny, policy)
        counter = FlopCounterMode(display=False)

        def head(hidden: Tensor, weight: Tensor) -> Any:
            with counter:
                return fused(row)(hidden, weight)

        policy(row, head)
        return counter.get_total_flops()

    assert 0 < head_flops(lora(tiny)) * 6 == head_flops(tied(tiny)) * 4


def test_answers_without_advantage_leave_the_backward_though_the_model_is_on_another_device(tiny) -> None:
    """Half of the answers: 4NHV FLOPs instead of 6NHV. On the meta device looking at a value would raise."""
    length = ROW_MULTIPLE
    row = replace(
        one_row(tiny, tied(tiny)),
        token_ids=torch.zeros(2 * length, dtype=torch.int64),
        row_ids=torch.arange(2).repeat_interleave(length),
    )
    hidden, weight = (torch.empty(size, 16, device="meta", requires_grad=True) for size in (2 * length, 40))

    def head_flops(*advantages: float) -> int:
        targets = RowTargets(torch.tensor(advantages), torch.zeros(2, dtype=torch.bool))
        head = policy_loss(row, targets, "grpo", AlgorithmConfig(loss_impl="torch"), 1.0, 2, 2 * length, length)
        with FlopCounterMode(display=False) as counter:
            head(hidden, weight)[0].backward()
        return counter.get_total_flops()

    assert head_flops(1.0, -1.0) == 6 * hidden.numel() * len(weight)
    assert head_flops(0.0, -1.0) == 4 * hidden.numel() * len(weight)


@pytest.mark.parametrize("build", [tied, lora])
def test_under_autocast_the_loss_is_the_fp32_one_but_for_rounding(tiny, build) -> None:
    """In bf16, within the instruction set that the trainer allows on a CPU."""
    policy = build(tiny)
    row = one_row(tiny, policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(policy, row, fused(row))
    expected_loss, expected = gradients(policy, row, fused(row))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=1e-3)
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([gradient.flatten() for gradient in each.values()]) for each in (found, expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


@ONE_FAMILY
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("beta", [pytest.param(0.0, marks=pytest.mark.slow), 0.04])
def test_log_probs_of_one_policy_are_the_same_to_the_bit_before_and_in_the_loss(
    tiny, monkeypatch: pytest.MonkeyPatch, impl: Literal["torch", "triton"], beta: float
) -> None:
    """In several chunks, with answers that leave the backward: ratio 1 and KL 0."""
    monkeypatch.setitem(kernel_head.LOGITS_BYTES, "cpu", 4 * 64 * ROW_MULTIPLE)
    policy = tied(tiny)
    groups = [tiny.group(tiny.prompt((3, 6, 4), seed=1), [40, 1, 30, 25])]
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)
    algorithm = AlgorithmConfig(loss_impl=impl, beta=beta)
    before = policy(row, log_probs(row, algorithm, 0.7)).detach()
    advantages, is_off_policy = torch.tensor([0.0, 1.0, -1.0, 0.0]), torch.zeros(4, dtype=torch.bool)
    targets = RowTargets(advantages, is_off_policy, old_logps=before, ref_logps=before if beta else None)
    _, metrics = policy(row, policy_loss(row, targets, "grpo", algorithm, 0.7, 4, 96, 40))
    assert metrics.as_dict()["ratio_min"] == metrics.as_dict()["ratio_max"] == 1
    assert metrics.as_dict()["kl"] == 0


@pytest.mark.parametrize("impl", ["auto", "torch", "triton"])
def test_loss_and_log_probs_are_made_by_the_implementation_asked_for(
    tiny, monkeypatch: pytest.MonkeyPatch, impl: Literal["auto", "torch", "triton"]
) -> None:
    asked: list[Any] = []
    for name in ("fused_linear_grpo_loss", "linear_logprob"):
        monkeypatch.setattr(loss_module, name, lambda *_, impl, **__: asked.append(impl) or (None, None))
    row = one_row(tiny, tied(tiny))
    hidden, weight = torch.zeros(len(row.token_ids), 8), torch.zeros(64, 8)
    fused(row, impl)(hidden, weight)
    log_probs(row, AlgorithmConfig(loss_impl=impl), 1.0)(hidden, weight)
    assert asked == [None if impl == "auto" else impl] * 2


def test_what_the_loss_compares_is_made_in_chunks_of_one_size(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where answers leave the backward: on a GPU another size would give other bits."""
    asked: list[Any] = []
    for name in ("fused_linear_grpo_loss", "linear_logprob"):
        monkeypatch.setattr(loss_module, name, lambda *_, chunk_size, **__: asked.append(chunk_size) or (None, None))
    row, algorithm = one_row(tiny, tied(tiny)), AlgorithmConfig(beta=0.0)
    hidden, weight = torch.zeros(len(row.token_ids), 8), torch.zeros(64, 8)
    targets = RowTargets(ADVANTAGES, torch.zeros(NUM_ANSWERS, dtype=torch.bool), old_logps=torch.zeros(len(hidden)))
    policy_loss(row, targets, "grpo", algorithm, 1.0, NUM_ANSWERS, len(hidden), 16)(hidden, weight)
    log_probs(row, algorithm, 1.0)(hidden, weight)
    assert asked[0] == asked[1] is not None


def test_an_idle_row_adds_nothing_to_any_gradient(tiny) -> None:
    """Not even where its hidden states are large; yet every parameter has a gradient, so that ranks keep in step."""
    policy = tied(tiny)
    found, gradient = gradients(policy, idle_row(policy.config, has_features=False), idle_loss)
    assert found == 0 and gradient.keys() == dict(policy.named_parameters()).keys()
    assert not any(bool(each.any()) for each in gradient.values())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [700, 5000])
def test_log_probs_are_the_same_to_the_bit_on_a_gpu(tiny, num_tokens: int) -> None:
    """A 3B head in bf16; a third of the answers leave the backward."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(*size, device="cuda", generator=generator)
    hidden, weight = draw(num_tokens, 2048).bfloat16(), (draw(151_936, 2048) / 2048**0.5).bfloat16()
    token_ids = torch.randint(151_936, (num_tokens,), generator=torch.Generator().manual_seed(0))
    row = replace(one_row(tiny, tied(tiny)), token_ids=token_ids, row_ids=torch.arange(num_tokens) % 3)
    algorithm, is_off_policy = AlgorithmConfig(beta=0.0), torch.zeros(3, dtype=torch.bool)
    before = log_probs(row, algorithm, 0.7)(hidden, weight)
    targets = RowTargets(torch.tensor([1.0, 0.0, -1.0]), is_off_policy, old_logps=before)
    head = policy_loss(row, targets, "grpo", algorithm, 0.7, 3, num_tokens, num_tokens)
    _, metrics = head(hidden.requires_grad_(), weight.requires_grad_())
    assert metrics.as_dict()["ratio_min"] == metrics.as_dict()["ratio_max"] == 1


def test_the_mean_over_tokens_weighs_long_answers_more_than_that_over_answers():
    """Ratio 1, +1 for 10 tokens and -1 for 20: J = -1/3 over tokens, 0 over answers."""
    hidden, weight = torch.zeros(30, 4), torch.zeros(8, 4)
    row_ids = torch.tensor([0] * 10 + [1] * 20)
    losses = {
        loss_type: fused_linear_grpo_loss(
            hidden, weight, torch.zeros(30, dtype=torch.int64), row_ids, advantages=torch.tensor([1.0, -1.0]),
            loss_type=loss_type, beta=0.0, impl="torch", num_rows=2, num_items_in_batch=30,
        )[0].item()
        for loss_type in ("dapo", "grpo")
    }  # fmt: skip
    assert losses == {"dapo": pytest.approx(1 / 3), "grpo": pytest.approx(0, abs=1e-7)}

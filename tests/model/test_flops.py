"""Counted FLOPs against torch's own counter, which sees every matrix product."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.flops import forward_flops, peak_bf16_flops
from tempsamp_fast.model.linear_layers import TreeRecurrence
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.shapes import text_shape
from tests.model.test_linear_layers import token_by_token


@pytest.fixture(autouse=True)
def recurrence_without_chunks_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of linear layers as the rule has them: a state read, corrected and read again for every token."""
    monkeypatch.setattr("tempsamp_fast.model.linear_layers.chunked_delta_rule", token_by_token)
    monkeypatch.setattr(TreeRecurrence, "_batches", lambda self, level: [[node] for node in level])


def counted(policy: Policy, row) -> float:
    """What torch counts of one forward pass; attention as plain products, so unseen tokens count too.

    Without the angles of rotary positions, a product in transformers 5.17 and none in 5.23.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        policy(row, torch.nn.functional.linear)
    modules = counter.get_flop_counts().items()
    angles = sum(sum(operations.values()) for name, operations in modules if name.endswith(".rotary_emb"))
    return counter.get_total_flops() - angles


def unseen(policy: Policy, row) -> float:
    """Text attention that plain products compute although it is masked out, and inputs that convolutions read again."""
    shape, pairs, read_twice = text_shape(policy.config), 0, 0
    for group in row.layout:
        prompt, answers = group.prompt_len, sum(group.branch_lens)
        if len(group.branch_lens) == 1:
            pairs += (prompt + answers) ** 2
        else:
            pairs += prompt**2 + answers * (prompt + answers)
        pairs -= prompt * (prompt + 1) // 2 + sum(n * prompt + n * (n + 1) // 2 for n in group.branch_lens)
        read_twice += (shape.kernel - 1) * (1 + len(group.branch_lens))
    read_twice -= shape.kernel - 1  # those before the row are none
    convolved = shape.num_linear * shape.kernel * shape.channels * read_twice
    return 4.0 * shape.num_attending * shape.query * pairs + 2.0 * convolved


@pytest.mark.parametrize("tiny", FAMILIES, indirect=True)
def test_flops_are_those_that_torch_counts(tiny) -> None:
    model = tiny.model()
    if "moe" in tiny.family:
        model.set_experts_implementation("eager")  # of grouped products torch counts none
    policy = Policy(model)
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    assert forward_flops(row, policy.config) == pytest.approx(counted(policy, row) - unseen(policy, row), rel=1e-9)


def test_features_at_hand_cost_nothing(tiny) -> None:
    model, groups = tiny.model(), tiny.groups()
    model.model.visual.requires_grad_(False)
    policy = Policy(model)
    for group in groups:
        (group.prompt,) = with_vision_features(policy, [group.prompt])
    (row,) = pack(groups, config=policy.config, max_tokens_per_row=10_000)
    assert forward_flops(row, policy.config) == pytest.approx(counted(policy, row) - unseen(policy, row), rel=1e-9)


@pytest.mark.parametrize(
    ("device_name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H20", 148),
        ("NVIDIA H20X", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_known_by_the_whole_name_or_not_at_all(device_name: str, tflops: float | None) -> None:
    assert peak_bf16_flops(device_name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("tiny", ["qwen3_vl_moe"], indirect=True)
@pytest.mark.parametrize(
    ("sparse", "num_routers"), [({}, 3), ({"decoder_sparse_step": 2}, 1), ({"mlp_only_layers": [0]}, 2)]
)
def test_only_layers_with_experts_are_counted_with_a_router(tiny, sparse: dict, num_routers: int) -> None:
    """As transformers builds them; dense or by two experts of four, a token's MLP is 48 wide."""
    model = tiny.model(**sparse)
    assert sum(hasattr(layer.mlp, "gate") for layer in model.model.language_model.layers) == num_routers
    assert text_shape(model.config).mlp_products == 32 * (3 * 3 * 48 + 4 * num_routers)

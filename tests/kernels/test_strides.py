"""Every tensor argument of every door, however it lies in memory: the tensor is read, not the bytes behind it.

And of whatever dtype it is, at any size down to nothing, and whichever of them take gradients.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tempsamp_kernels import (
    FusedLinearGRPOLoss,
    fused_linear_grpo_loss,
    fused_selective_log_softmax,
    grouped_advantages,
    linear_logprob,
    triton_grpo_loss,
)
from torch import Tensor

# The interpreter computes with numpy, which warns about the log(0) and inf - inf of rows that are not counted.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = ("column", "shifted", "reversed axes", "expanded")
B, T, H, V = 2, 3, 4, 19
N = B * T


def rubbish(value: Tensor, *shape: int) -> Tensor:
    """Memory full of what no reader may see: NaN, an id outside of everything, or True."""
    fill = torch.nan if value.is_floating_point() else True if value.dtype == torch.bool else 10**6
    return torch.full(shape, fill, dtype=value.dtype, device=value.device)


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values in another layout; "expanded" repeats the first entry instead, without memory for the others."""
    if layout == "column":
        memory = rubbish(value, *value.shape, 2)
        memory[..., 1] = value
        return memory[..., 1]
    if layout == "shifted":
        memory = rubbish(value, value.numel() + 2)
        memory[1:-1] = value.flatten()
        return memory[1:-1].view(value.shape)
    if layout == "reversed axes":
        return value.permute(*reversed(range(value.ndim))).contiguous().permute(*reversed(range(value.ndim)))
    return value[:1].expand(value.shape) if layout == "expanded" else value


def random_arguments(seed: int, B: int = B, T: int = T) -> dict[str, Tensor]:
    """By name and shape: what the doors call them."""
    N = B * T
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    coin = lambda *shape: torch.rand(*shape, generator=generator) > 0.3
    ids = torch.randint(V, (B, T), generator=generator)
    return {
        "hidden": normal(N, H), "weight": normal(V, H), "token_ids": ids.view(-1), "bias": normal(V),
        "row_ids": torch.arange(B).repeat_interleave(T), "advantages": normal(B), "rewards": normal(B),
        "group_ids": torch.zeros(B, dtype=torch.int64), "is_off_policy": coin(B), "format_rewards": normal(B),
        "group_mean": normal(B), "group_std": normal(B).abs() + 0.1, "row_mask": coin(B),
        "old_logps": normal(N) - 3, "ref_logps": normal(N) - 3, "mask": coin(N), "temperature": normal(B).exp(),
        "importance_weights": normal(N).exp(), "entropy_threshold": normal(N).abs(), "live_rows": coin(N),
        "_input": normal(B, T, H), "lin_weight": normal(V, H), "selected_token_ids": ids,
        "attention_mask": coin(B, T), "ref_per_token_logps": normal(B, T) - 3, "vllm_is_ratio": normal(B, T).exp(),
        "old_per_token_logps": normal(B, T) - 3, "logits": normal(B, T + 1, V), "completion_ids": ids,
        "old_logp": normal(B, T) - 3, "ref_logp": normal(B, T) - 3, "completion_mask": coin(B, T),
        "input_ids": ids,
    }  # fmt: skip


PACKED = ("hidden", "weight", "token_ids", "row_ids", "bias", "old_logps", "ref_logps", "mask", "temperature")
PACKED += ("is_off_policy", "row_mask", "importance_weights", "entropy_threshold")
PADDED = ("_input", "lin_weight", "selected_token_ids", "attention_mask", "advantages", "bias", "ref_per_token_logps")
HELD = ("logits", "old_logp", "ref_logp", "completion_ids", "advantages", "completion_mask", "vllm_is_ratio")
GROUPS = ("rewards", "group_ids", "is_off_policy", "format_rewards")
sequence = {"importance_sampling_level": "sequence"}
DOORS = {
    "loss": (partial(fused_linear_grpo_loss, entropy_coef=0.1), (*PACKED, "advantages", "live_rows")),
    "loss, sequence": (partial(fused_linear_grpo_loss, **sequence), (*PACKED, "advantages")),
    "loss, rewards": (fused_linear_grpo_loss, (*PACKED, "rewards", "group_ids", "format_rewards")),
    "log-prob": (linear_logprob, ("hidden", "weight", "token_ids", "bias")),
    "advantages": (grouped_advantages, GROUPS),
    "advantages, moments": (partial(grouped_advantages, shaping="mixed"), (*GROUPS, "group_mean", "group_std")),
    "Liger": (None, (*PADDED, "old_per_token_logps", "vllm_is_ratio")),
    "logits": (triton_grpo_loss, HELD),
    "logits, copied": (partial(triton_grpo_loss, inplace=False, **sequence), HELD),
    "log-softmax": (partial(fused_selective_log_softmax, inplace=True), ("logits", "input_ids")),
}
LEARNED = ("hidden", "weight", "bias", "_input", "lin_weight", "logits")


def outcome(door: str, impl: str, arguments: dict[str, Tensor], learned: tuple[str, ...] = LEARNED) -> list[Tensor]:
    """Everything that a door returns, and the gradients of a weighted sum of it."""
    function = FusedLinearGRPOLoss(impl=impl) if door == "Liger" else partial(DOORS[door][0], impl=impl)
    leaves = {name: value.requires_grad_() for name, value in arguments.items() if name in learned}
    is_leaf = "logits" in leaves and leaves["logits"].is_contiguous()
    found = function(**arguments | ({"logits": leaves["logits"] * 1} if is_leaf else {}))
    found = [found] if isinstance(found, Tensor) else [part for part in found if isinstance(part, Tensor)]
    total = sum((part * torch.linspace(1, 2, part.numel()).view(part.shape).to(part)).sum() for part in found)
    gradients = torch.autograd.grad(total, list(leaves.values())) if leaves else ()
    return [*(part.detach() for part in found), *gradients]


@pytest.mark.parametrize("turn", [0, 2, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 3))])
@pytest.mark.parametrize("door", DOORS)
def test_any_layout_gives_what_the_torch_twin_makes_of_contiguous_copies(door, turn):
    """Each argument in a layout of its own, neighbours in others; expanded ones repeat a row, as the copies then do."""
    every, arguments = random_arguments(turn), {}
    for place, name in enumerate(DOORS[door][1]):
        layout = LAYOUTS[(place + turn) % len(LAYOUTS)]
        value = every[name] if name == "live_rows" else every[name].to(DEVICE)
        if name in ("row_ids", "live_rows") and layout == "expanded":
            layout = "column"
        arguments[name] = laid_out(value if name != "live_rows" else torch.ones_like(value), layout)
    copies = {name: value.contiguous().clone() for name, value in arguments.items()}
    found = outcome(door, "triton", arguments)
    for actual, expected in zip(found, outcome(door, "torch", copies), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_logits_whose_rows_share_memory_are_never_overwritten(impl):
    """An expanded batch: a gradient written in place would be read as a logit by the next row."""
    torch.manual_seed(0)
    one, ids = torch.randn(1, 4, V, device=DEVICE), torch.randint(V, (3, 3), device=DEVICE)
    found, expected = one.clone().requires_grad_(), one.clone().requires_grad_()
    fused_selective_log_softmax(found.expand(3, 4, V), ids, inplace=True, impl=impl).sum().backward()
    fused_selective_log_softmax(expected.repeat(3, 1, 1), ids, impl="torch").sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.detach(), one)


IDS = ("token_ids", "row_ids", "group_ids", "selected_token_ids", "completion_ids", "input_ids", "live_rows")


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_vectors_of_any_dtype_mean_their_values(door, impl, data):
    """Masks as numbers, log-probs and advantages in fp64 or half precision."""
    every, arguments, expected = random_arguments(data.draw(st.integers(0, 9), label="seed")), {}, {}
    for name in DOORS[door][1]:
        value, dtype = every[name].to(DEVICE if name != "live_rows" else "cpu"), every[name].dtype
        if name not in (*IDS, *LEARNED):
            numbers = [torch.float64, torch.bfloat16, torch.float16]
            dtype = data.draw(st.sampled_from(numbers if value.is_floating_point() else [torch.int64, torch.uint8]))
        arguments[name] = value.clone().to(dtype)
        expected[name] = arguments[name].to(value.dtype)
    for actual, value in zip(outcome(door, impl, arguments), outcome(door, impl, expected), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("door", [door for door, (_, names) in DOORS.items() if {"hidden", "_input"} & set(names)])
def test_each_leaf_has_the_gradient_that_it_has_among_all(door, impl):
    every = {name: value.to(DEVICE) for name, value in random_arguments(0).items() if name in DOORS[door][1]}
    every |= {"live_rows": every["live_rows"].cpu()} if "live_rows" in every else {}
    copies = lambda: {name: value.detach().clone() for name, value in every.items()}
    learned = [name for name in every if name in LEARNED]
    *_, all_of_them = [outcome(door, impl, copies())[-len(learned) :]]
    for name, expected in zip(learned, all_of_them, strict=True):
        found = outcome(door, impl, copies(), learned=(name,))[-1]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 1), (2, 1), (2, 0), (0, 3)])
@pytest.mark.parametrize("door", DOORS)
def test_any_size_gives_what_the_torch_twin_gives(door, num_rows, length, impl):
    def arguments():
        every = random_arguments(0, num_rows, length)
        return {name: every[name].to(DEVICE if name != "live_rows" else "cpu") for name in DOORS[door][1]}

    for actual, expected in zip(outcome(door, impl, arguments()), outcome(door, "torch", arguments()), strict=True):
        assert not actual.isnan().any() or num_rows == 0
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)

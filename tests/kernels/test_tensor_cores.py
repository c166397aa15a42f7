"""Heads that a GPU multiplies in half precision, on a CPU that is told to multiply such operands into fp32 as well."""

from __future__ import annotations

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob
from tempsamp_kernels import head as heads
from tempsamp_kernels.head import ChunkedHead, finish, gradient_scale
from tempsamp_kernels.tokens import ALIGNMENT
from torch.utils._python_dispatch import TorchDispatchMode

LENGTHS = [5, 8, 3]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    """Products of half-precision operands, accumulated in fp32, as `mm` and `addmm_` make them on CUDA."""

    def mm(a, b, dtype=torch.float32, out=None):
        assert a.dtype == b.dtype, "tensor cores take one dtype"
        product = torch.mm(a.float(), b.float())
        return product.to(dtype) if out is None else out.copy_(product)

    monkeypatch.setattr(heads, "multiplies_into_fp32", lambda _, dtype: dtype in HALVES)
    monkeypatch.setattr(heads, "mm", mm)
    monkeypatch.setattr(heads, "addmm_", lambda total, a, b: total.add_(a.float() @ b.float()))


def learn(batch, dtype, scale=1.0, parameters=None, **options):
    """Loss and gradients of hidden states and head in half precision, under a scaled loss."""
    x = batch.hidden.to(dtype).requires_grad_()
    w = batch.weight.to(parameters or dtype).requires_grad_()
    loss, _ = fused_linear_grpo_loss(
        x, w, batch.token_ids, batch.row_ids, advantages=batch.advantages, old_logps=batch.old_logps, **options
    )
    (scale * loss).backward()
    return loss.detach(), x.grad, w.grad


def assert_near(found, expected, tolerance):
    for actual, value in zip(found, expected, strict=True):
        assert (actual.float() - value.float()).norm() <= tolerance * value.float().norm()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("chunk_size", [None, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_fp32_products_but_for_one_rounding(packed, dtype, chunk_size, impl):
    """In one chunk, whose dW waits for the backward, and in several."""
    batch = packed(LENGTHS, masked=0.0)
    options = {"chunk_size": chunk_size, "impl": impl}
    found = learn(batch, dtype, scale=3.0, **options)
    rounded = {name: getattr(batch, name).to(dtype).float() for name in ("hidden", "weight")}
    expected = learn(type(batch)(**{**vars(batch), **rounded}), torch.float32, scale=3.0, **options)
    assert [gradient.dtype for gradient in found[1:]] == [dtype, dtype]
    assert_near(found, expected, 8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4])
def test_float16_gradients_of_any_size_are_kept_until_the_loss_is_scaled(packed, factor, level):
    """A GradScaler's factor comes after the gradients are made: none may underflow or overflow before."""
    batch = packed(LENGTHS, masked=0.0)
    batch = type(batch)(**{**vars(batch), "advantages": batch.advantages * factor})
    options = {"importance_sampling_level": level, "chunk_size": 8, "impl": "torch"}
    found = learn(batch, torch.float16, scale=2.0**4 / factor, **options)
    expected = learn(batch, torch.float32, scale=2.0**4 / factor, **options)
    assert_near(found[1:], expected[1:], 5e-3)


@pytest.mark.parametrize("dtype", HALVES)
def test_log_probs_of_tiny_upstream_gradients_keep_theirs(packed, dtype):
    batch = packed(LENGTHS, masked=0.0)
    upstream = 1e-4 * torch.linspace(-1, 1, sum(LENGTHS))

    def gradient(dtype):
        w = batch.weight.to(dtype).requires_grad_()
        logp, _ = linear_logprob(batch.hidden.to(dtype), w, batch.token_ids, impl="torch")
        return torch.autograd.grad((logp * upstream).sum(), w)[0]

    assert_near([gradient(dtype)], [gradient(torch.float32)], 5e-3 if dtype == torch.bfloat16 else 1.5e-3)


def test_a_head_in_fp32_under_autocast_gets_an_fp32_gradient(packed):
    batch = packed(LENGTHS, masked=0.0)
    expected = learn(batch, torch.bfloat16, parameters=torch.float32, impl="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learn(batch, torch.float32, impl="torch")
    assert found[2].dtype == torch.float32
    assert_near(found, expected, 8e-3)


def test_the_only_chunk_of_bf16_makes_its_weight_gradient_in_the_backward_and_can_do_so_again(packed):
    """No fp32 matrix of the head's size: [V, H] floats are 2 GiB for a 7B head."""
    batch = packed(LENGTHS, masked=0.0)
    x, w = batch.hidden.bfloat16().requires_grad_(), batch.weight.bfloat16().requires_grad_()

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float32:
                made.append(found.shape)
            return found

    with Watch():
        loss, _ = fused_linear_grpo_loss(x, w, batch.token_ids, batch.row_ids, advantages=batch.advantages)
    assert x.shape in made and made.count(w.shape) == 1, "the test's own product casts the head once"
    first = torch.autograd.grad(loss, w, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, w)[0])


def test_logits_have_aligned_rows_for_every_vocabulary():
    for vocab_size in (3, 16, 50257, 151665, 128257):
        logits = ChunkedHead(torch.empty(5, 2), torch.empty(vocab_size, 2), None, 4).buffer(4)
        assert logits.shape == (4, vocab_size) and logits.stride(0) % ALIGNMENT == 0
        assert logits.stride(0) - vocab_size < ALIGNMENT


def test_a_gradient_scale_is_a_power_of_two_and_only_for_float16():
    assert gradient_scale(torch.tensor([1e-5]), torch.bfloat16) is None
    for largest in (1e-9, 1e-3, 1.0, 7.0, 1e6):
        scale = gradient_scale(torch.tensor([0.0, -largest, largest / 3]), torch.float16)
        assert scale.log2().frac() == 0 and 32 < scale * largest <= 64
    assert gradient_scale(torch.zeros(2), torch.float16) == gradient_scale(torch.zeros(0), torch.float16) == 1


def test_nothing_to_learn_from_still_gives_a_weight_gradient_of_zeros(packed):
    batch = packed([])
    *_, d_weight = learn(batch, torch.bfloat16, num_rows=1)
    assert d_weight.shape == batch.weight.shape and not d_weight.any()
    assert finish((None,) * 5, [None] * 3, None) == (None, None, None)

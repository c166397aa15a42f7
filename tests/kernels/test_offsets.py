"""Offsets beyond 2**31 elements: a GPU alone has the memory, and int32 offsets go wrong only there.

[1, 14_500, 151_936] logits have 2.2e9 elements: the last 365 rows lie beyond the bound.
"""

from __future__ import annotations

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, fused_selective_log_softmax, linear_logprob, triton_grpo_loss
from torch import Tensor

NUM_ROWS, VOCAB, HIDDEN = 14_500, 151_936, 2048
LAST = slice(NUM_ROWS - 64, NUM_ROWS)
GIB = 2**30

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def memory_given_back():
    """So that each test starts with the whole card."""
    yield
    torch.cuda.empty_cache()


def require_free(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"takes {gib} GiB of GPU memory, and {free:.0f} are free")


def random_logits() -> tuple[Tensor, Tensor]:
    """[1, NUM_ROWS + 1, VOCAB] bf16, the last one unread, and targets [1, NUM_ROWS]."""
    torch.manual_seed(0)
    logits = torch.empty(1, NUM_ROWS + 1, VOCAB, device="cuda", dtype=torch.bfloat16).normal_()
    return logits, torch.randint(VOCAB, (1, NUM_ROWS), device="cuda")


def torch_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """[rows] of logits [rows, VOCAB], in fp32."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def random_head(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 hidden states and 3B head, both leaves, and targets."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, HIDDEN, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, device="cuda") / HIDDEN**0.5).bfloat16().requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (num_tokens,), device="cuda")


def test_log_softmax_of_the_last_rows() -> None:
    require_free(20)
    logits, ids = random_logits()
    rows = logits[0, LAST].clone().requires_grad_()
    expected = torch_logps(rows, ids[0, LAST])
    expected.sum().backward()
    leaf = logits.requires_grad_()
    logps = fused_selective_log_softmax(leaf * 1, ids, 1.0, inplace=True, impl="triton")
    logps.sum().backward()
    torch.testing.assert_close(logps[0, LAST].float(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.grad[0, LAST], rows.grad, rtol=2e-2, atol=1e-4)
    assert not leaf.grad[0, -1].any()


def test_grpo_loss_of_the_last_rows() -> None:
    require_free(20)
    logits, ids = random_logits()
    old = torch.full((1, NUM_ROWS), -12.0, device="cuda")
    advantages = torch.ones(1, device="cuda")
    rows = logits[0, LAST].clone().requires_grad_()
    expected = torch_logps(rows, ids[0, LAST])
    ratio = (expected - old[0, LAST]).exp()
    loss = -torch.minimum(ratio, ratio.clamp(0.8, 1.4))
    loss.sum().backward()
    leaf = logits.requires_grad_()
    per_token = triton_grpo_loss(
        leaf * 1, old, None, ids, advantages, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.4, impl="triton"
    )[0]
    per_token.sum().backward()
    torch.testing.assert_close(per_token[0, LAST].float(), loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(leaf.grad[0, LAST], rows.grad, rtol=2e-2, atol=1e-4)


def test_log_probs_of_65536_tokens_in_one_chunk() -> None:
    """1e10 logits at once, where memory permits."""
    require_free(60)
    hidden, weight, ids = (tensor.detach() for tensor in random_head(65_536))
    logp, _ = linear_logprob(hidden, weight, ids, impl="triton", chunk_size=65_536)
    expected = torch_logps(hidden[-64:].float() @ weight.float().T, ids[-64:])
    torch.testing.assert_close(logp[-64:], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("num_tokens", "chunk_size", "gib"), [(65_536, None, 12), (NUM_ROWS, NUM_ROWS, 24)])
def test_the_fused_loss_of_the_last_rows(num_tokens: int, chunk_size: int | None, gib: float) -> None:
    """65,536 tokens in chunks, and more than 2**31 logits in one."""
    require_free(gib)
    hidden, weight, ids = random_head(num_tokens)
    row_ids = torch.arange(num_tokens, device="cuda") // -(-num_tokens // 8)
    advantages = torch.linspace(-1, 1, 8, device="cuda")
    loss, metrics = fused_linear_grpo_loss(
        hidden, weight, ids, row_ids, advantages=advantages, loss_type="dapo", beta=0.0, chunk_size=chunk_size,
        impl="triton",
    )  # fmt: skip
    loss.backward()
    last = hidden.detach()[-64:].float().requires_grad_()
    logps = torch_logps(last @ weight.detach().float().T, ids[-64:])
    (-(logps - logps.detach()).exp() * advantages[row_ids[-64:]]).sum().div(num_tokens).backward()
    torch.testing.assert_close(metrics.token_logps[-64:], logps.detach(), rtol=1e-3, atol=1e-3)
    assert (hidden.grad[-64:].float() - last.grad).norm() < 1e-2 * last.grad.norm()

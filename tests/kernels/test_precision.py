"""Error against fp64 autograd on bf16 operands: never much above that of torch with fp32 logits and the same dtypes."""

from __future__ import annotations

import pytest
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE = 24, 32, 257


def peaked_head(seed):
    """bf16 hidden states and head; every second token has a margin of up to 30 nats."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator)
    token_ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    margins = torch.linspace(0, 30, NUM_TOKENS)[:, None] * (torch.arange(NUM_TOKENS) % 2)[:, None]
    direction = weight[token_ids] / weight[token_ids].square().sum(-1, keepdim=True)
    hidden = 0.5 * torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=generator) + margins * direction
    advantages = torch.randn(3, generator=generator)
    old = 0.3 * torch.randn(NUM_TOKENS, generator=generator)
    return [tensor.to(DEVICE) for tensor in (hidden.bfloat16(), weight.bfloat16(), token_ids, advantages, old)]


def truth_of(hidden, weight, token_ids, advantages, old_offset):
    """(loss, dX, dW, logp) in fp64, and the old log-probs."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(x @ w.T, -1).gather(-1, token_ids[:, None])[:, 0]
    old = logp.detach() + old_offset
    loss = clipped_loss(logp, old, advantages)
    loss.backward()
    return [loss.detach(), x.grad, w.grad, logp.detach()], old.float()


def clipped_loss(logp, old, advantages):
    advantage = advantages.to(logp.dtype).repeat_interleave(NUM_TOKENS // 3)
    ratio = torch.exp(logp - old)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def fp32_logits(hidden, weight, token_ids, advantages, old):
    """torch with fp32 logits; both backward GEMMs read bf16 and write the parameters' dtype, as autocast would."""
    logits = (hidden.float() @ weight.float().T).requires_grad_()
    logp = torch.log_softmax(logits, -1).gather(-1, token_ids[:, None])[:, 0]
    loss = clipped_loss(logp, old, advantages)
    (d_logits,) = torch.autograd.grad(loss, logits)
    d_logits = d_logits.bfloat16().float()
    d_hidden, d_weight = d_logits @ weight.float(), d_logits.T @ hidden.float()
    return [loss.detach(), d_hidden.bfloat16(), d_weight.bfloat16(), logp.detach()]


def ours(hidden, weight, token_ids, advantages, old, impl):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    row_ids = torch.arange(3, device=DEVICE).repeat_interleave(NUM_TOKENS // 3)
    loss, metrics = fused_linear_grpo_loss(
        x, w, token_ids, row_ids, advantages=advantages, old_logps=old, beta=0.0, chunk_size=NUM_TOKENS, impl=impl
    )
    loss.backward()
    return [loss.detach(), x.grad, w.grad, metrics.token_logps]


def errors(found, truth):
    """Root mean square error of each."""
    return torch.stack([(a.double() - t).square().mean().sqrt() for a, t in zip(found, truth, strict=True)])


@pytest.mark.parametrize(("impl", "num_seeds"), [("torch", 20), pytest.param("triton", 20, marks=pytest.mark.slow)])
def test_error_is_at_most_half_as_much_again_as_that_of_fp32_logits(impl, num_seeds):
    """Of loss, dX, dW and log-prob, mean over 20 seeds of peaked logits."""
    mine, baseline = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(num_seeds):
        *inputs, offset = peaked_head(seed)
        truth, old = truth_of(*inputs, offset)
        mine += errors(ours(*inputs, old, impl), truth).cpu()
        baseline += errors(fp32_logits(*inputs, old), truth).cpu()
    assert (mine <= 1.5 * baseline).all(), (mine / baseline).tolist()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_log_probs_are_far_below_the_error_of_bf16_logits(impl):
    hidden, weight, token_ids, *_ = peaked_head(0)
    truth = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, token_ids[:, None])[:, 0]
    found, _ = linear_logprob(hidden, weight, token_ids, chunk_size=8, impl=impl)
    logits = (hidden.float() @ weight.float().T).bfloat16()
    rounded = torch.log_softmax(logits.float(), -1).gather(-1, token_ids[:, None])[:, 0]
    error, bf16_error = ((value.double() - truth).abs().mean() for value in (found, rounded))
    assert error < bf16_error / 1000, (float(error), float(bf16_error))

"""Every kernel once on ragged small shapes, for compute-sanitizer: odd vocabularies, empty rows, padding of NaN."""

from __future__ import annotations

from itertools import product

import torch
from tempsamp_kernels import (
    fused_linear_grpo_loss,
    fused_selective_log_softmax,
    grouped_advantages,
    linear_logprob,
    triton_grpo_loss,
)

HIDDEN = 64
LENGTHS = (5, 1, 32, 0, 7)
SHAPINGS = ("grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl")


def run_head(num_vocab: int, dtype: torch.dtype) -> None:
    num_tokens = sum(LENGTHS)
    row_ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).cuda()
    hidden = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(num_vocab, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    token_ids = torch.randint(num_vocab, (num_tokens,), device="cuda")
    with torch.no_grad():
        hidden[3] = float("nan")
    mask = torch.arange(num_tokens, device="cuda") != 3
    old = torch.randn(num_tokens, device="cuda")
    for level in ("token", "sequence"):
        loss, _ = fused_linear_grpo_loss(
            hidden, weight, token_ids, row_ids, advantages=torch.randn(len(LENGTHS), device="cuda"),
            old_logps=old, ref_logps=old, mask=mask, importance_sampling_level=level, impl="triton",
        )  # fmt: skip
        assert torch.isfinite(torch.autograd.grad(loss, weight)[0]).all()
    logp, entropy = linear_logprob(hidden[4:], weight, token_ids[4:], impl="triton")
    (logp.sum() + entropy.sum()).backward()


def run_logits(num_vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 8, num_vocab, device="cuda", dtype=dtype, requires_grad=True)
    token_ids = torch.randint(num_vocab, (3, 7), device="cuda")
    old = torch.randn(3, 7, device="cuda")
    advantages = torch.randn(3, device="cuda")
    loss, _ = triton_grpo_loss(logits * 1, old, old, token_ids, advantages, reduce=True, impl="triton")
    loss.backward()
    fused_selective_log_softmax(logits * 1, token_ids, impl="triton").sum().backward()


def run_advantages(shaping: str) -> None:
    sizes = torch.tensor([8, 1, 300])
    group_ids = torch.arange(3).repeat_interleave(sizes).cuda()
    rewards = torch.rand(len(group_ids), device="cuda")
    is_off_policy = torch.arange(len(group_ids), device="cuda") % 8 == 7
    result = grouped_advantages(rewards, group_ids, is_off_policy, shaping=shaping, impl="triton")
    assert torch.isfinite(result).all()


def main() -> None:
    torch.manual_seed(0)
    for num_vocab, dtype in product((37, 4099), (torch.float32, torch.bfloat16)):
        run_head(num_vocab, dtype)
        run_logits(num_vocab, dtype)
    for shaping in SHAPINGS:
        run_advantages(shaping)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()

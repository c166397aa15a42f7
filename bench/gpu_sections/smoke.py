"""Whether the GPU computes what the CPU was tested to compute, at full width and two layers: minutes before figures."""

from __future__ import annotations

import torch
from tempsamp_kernels import fused_linear_grpo_loss
from torch import Tensor

from bench.gpu_sections.attention import log_prob_gradients
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import HEAD_SHAPES, PUBLISHED, Scale
from bench.gpu_sections.rollout import log_prob_error, ours, share_of_same_tokens
from bench.gpu_sections.timing import distance, require
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decoding import GraphDecoder

LENGTH, DEPTH, NUM_TOKENS = 16, 2, 96


def measure(record: Record, scale: Scale = PUBLISHED) -> None:
    model = scale.model("3B", depth=DEPTH)
    apply_liger_layers(model, "auto")
    policy = Policy(model)
    with record.attempt("packed rows"):
        packed_as_separate(record, scale, policy)
    with record.attempt("rollout"):
        graphs_as_eager(record, scale, policy)
    with record.attempt("loss"):
        loss_as_torch(record, scale)


def packed_as_separate(record: Record, scale: Scale, policy: Policy) -> None:
    rows = {mode: scale.rows(policy.config, LENGTH, 4, mode=mode) for mode in ("shared_prefix", "none")}
    logps, gradients = zip(*(log_prob_gradients(policy, some) for some in rows.values()), strict=True)
    pairs = list(zip(*gradients, strict=True))
    difference = sum((a.float() - b.float()).square().sum() for a, b in pairs)
    total = difference / sum(b.float().square().sum() for _, b in pairs)
    record.add(
        "packed rows",
        logp=require((logps[0] - logps[1]).abs().mean().item(), 0.03, "distance of packed log-probs"),
        gradient=require(float(total) ** 0.5, 0.1, "distance of packed gradients"),
    )


def graphs_as_eager(record: Record, scale: Scale, policy: Policy) -> None:
    """Twice with the same recording; and both as the training forward has them."""
    policy.eval()
    prompts = [scale.video_prompt(seed) for seed in range(2)]
    eager, decoder = ours(policy, LENGTH, prompts), GraphDecoder() if scale.device == "cuda" else None
    replayed = [ours(policy, LENGTH, prompts, decoder) for _ in range(2)]
    differing = [1 - share_of_same_tokens(eager, each) for each in replayed]
    record.add(
        "rollout",
        differing=[require(each, 0.5, "share of tokens that graphs draw differently") for each in differing],
        logp_error=require(log_prob_error(policy, prompts[0], eager[0]), 0.03, "error of the sampled log-probs"),
    )


def loss_as_torch(record: Record, scale: Scale) -> None:
    """Loss and gradients of the fused loss against its twin in float64, beside which bfloat16 may be 2 % off."""
    hidden_size, vocab_size = HEAD_SHAPES["3B"] if scale.text_values is None else (64, 1000)
    torch.manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, hidden_size, device=scale.device).bfloat16()
    weight = (torch.randn(vocab_size, hidden_size, device=scale.device) / hidden_size**0.5).bfloat16()
    token_ids = torch.randint(vocab_size, (NUM_TOKENS,), device=scale.device)
    row_ids, advantages = torch.arange(NUM_TOKENS, device=scale.device) // (NUM_TOKENS // 4), torch.linspace(-1, 1, 4)

    def results(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [each.to(dtype).requires_grad_() for each in (hidden, weight)]
        given = {"advantages": advantages.to(scale.device), "loss_type": "dapo", "beta": 0.0}
        if dtype == torch.float64:
            logps = (leaves[0] @ leaves[1].T).log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]
            loss = -(logps * given["advantages"].double()[row_ids]).mean()
        else:
            loss, _ = fused_linear_grpo_loss(*leaves, token_ids, row_ids, **given)
        return torch.autograd.grad(loss, leaves)

    errors = [distance(a, b) for a, b in zip(results(torch.bfloat16), results(torch.float64), strict=True)]
    record.add("loss", error=[require(each, 0.02, "error of a gradient of the loss") for each in errors])

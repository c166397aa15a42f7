"""Error against fp64 of five ways to compute a GRPO loss from bf16 hidden states and a bf16 head, beside ours.

    python -m bench.loss_error_table [--output bench/results/loss_error.json]

Same bf16 inputs and bf16 gradients for all; half of the tokens are confident (margins up to 30 nats). Columns: log-prob
(mean and largest absolute error), loss (relative, mean over the seeds), dX and dW (relative Frobenius norm).
On a CPU the bf16 products of ours are exact and the gradient of the logits stays fp32; a GPU rounds the latter to bf16.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from statistics import fmean

# Without it oneDNN may pick AMX kernels for bf16 where the system does not grant AMX: illegal instruction.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import torch
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from tempsamp_kernels import linear_logprob
from torch import Tensor
from torch.nn import functional

from bench import loss_contenders
from bench.loss_contenders import LossBatch, torch_loss, trl_logps

ROWS, LENGTH, HIDDEN, VOCAB = 8, 64, 256, 32768
VERL_VOCAB_PER_SPLIT = 9504


def exact_logps(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """fp64, with the target left out of the sum: x - logsumexp(x) would round for confident tokens even there."""
    logits, index = hidden @ weight.T, token_ids[:, None]
    gap = logits.scatter(1, index, -torch.inf).logsumexp(1) - logits.gather(1, index)[:, 0]
    return -functional.softplus(gap, threshold=60)


def make_batch(seed: int, device: str) -> LossBatch:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = ROWS * LENGTH
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) / HIDDEN**0.5
    token_ids = torch.randint(VOCAB, (num_tokens,), generator=generator)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator)
    confidence = torch.linspace(0, 60, num_tokens).where(torch.arange(num_tokens) % 2 == 0, 0)
    hidden += confidence[:, None] * functional.normalize(weight[token_ids], dim=1)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logps = exact_logps(hidden.double(), weight.double(), token_ids).float()
    noise = torch.randn(2, num_tokens, generator=generator)
    advantages = torch.randn(ROWS, generator=generator)
    batch = LossBatch(hidden, weight, token_ids, advantages, logps + 0.3 * noise[0], logps + 0.2 * noise[1])
    return LossBatch(*(tensor.to(device) for tensor in astuple(batch)))


class Fp32Logits(torch.autograd.Function):
    """hidden @ weight.T in fp32 from bf16 operands; the gradient of the logits is rounded to bf16 for its GEMMs."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden.float() @ weight.float().T

    @staticmethod
    def backward(ctx, d_logits):
        hidden, weight = ctx.saved_tensors
        d_logits = d_logits.bfloat16().float()
        return (d_logits @ weight.float()).bfloat16(), (d_logits.T @ hidden.float()).bfloat16()


class VerlArithmetic(torch.autograd.Function):
    """verl 0.9's Triton kernel: fp32 accumulators, log-prob = x - logsumexp, bf16 dX summed over vocabulary splits."""

    @staticmethod
    def forward(ctx, hidden, weight, token_ids):
        logits = hidden.float() @ weight.float().T
        lse = logits.logsumexp(1)
        ctx.save_for_backward(hidden, weight, token_ids, lse)
        return logits.gather(1, token_ids[:, None])[:, 0] - lse

    @staticmethod
    def backward(ctx, d_logps):
        hidden, weight, token_ids, lse = ctx.saved_tensors
        d_hidden, d_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        for start in range(0, VOCAB, VERL_VOCAB_PER_SPLIT):
            split = slice(start, start + VERL_VOCAB_PER_SPLIT)
            probabilities = (hidden.float() @ weight[split].float().T - lse[:, None]).exp()
            is_target = torch.arange(VOCAB, device=hidden.device)[split] == token_ids[:, None]
            d_logits = (d_logps[:, None] * (is_target.float() - probabilities)).bfloat16()
            d_hidden += d_logits @ weight[split]
            d_weight[split] = d_logits.T @ hidden
        return d_hidden, d_weight, None


def ours(batch: LossBatch) -> tuple[Tensor, Tensor]:
    logps, _ = linear_logprob(batch.hidden.detach(), batch.weight.detach(), batch.token_ids)
    return logps, loss_contenders.ours(batch)


def through_log_probs(log_prob: Callable[[Tensor, Tensor, Tensor], Tensor]):
    def way(batch: LossBatch) -> tuple[Tensor, Tensor]:
        logps = log_prob(batch.hidden, batch.weight, batch.token_ids)
        return logps, torch_loss(logps, batch)

    return way


def selected_log_softmax(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(1).gather(1, token_ids[:, None])[:, 0]


def liger(batch: LossBatch) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logps = LigerFusedLinearPPOBase.chunk_forward(batch.hidden[None], batch.weight, batch.token_ids[None])[0]
    return logps, loss_contenders.liger(batch)


WAYS = {
    "ours": ours,
    "torch, fp32 logits": through_log_probs(lambda x, w, ids: selected_log_softmax(Fp32Logits.apply(x, w), ids)),
    "torch, bf16 logits": through_log_probs(lambda x, w, ids: selected_log_softmax(functional.linear(x, w), ids)),
    "TRL 1.16 ChunkedLogProbFunction": through_log_probs(trl_logps),
    "Liger 0.8.5 LigerFusedLinearGRPOLoss": liger,
    "verl 0.9 linear_cross_entropy (its arithmetic)": through_log_probs(VerlArithmetic.apply),
}


def leaves(batch: LossBatch, dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype).detach().clone().requires_grad_() for tensor in (batch.hidden, batch.weight)]


def errors(seed: int, device: str) -> dict[str, dict[str, float]]:
    batch = make_batch(seed, device)
    exact_hidden, exact_weight = leaves(batch, torch.float64)
    exact = exact_logps(exact_hidden, exact_weight, batch.token_ids)
    exact_loss = torch_loss(exact, batch)
    exact_gradients = torch.autograd.grad(exact_loss, (exact_hidden, exact_weight))
    table = {}
    for name, way in WAYS.items():
        hidden, weight = leaves(batch, torch.bfloat16)
        logps, loss = way(replace(batch, hidden=hidden, weight=weight))
        gradients = torch.autograd.grad(loss, (hidden, weight))
        difference = (logps.detach().double() - exact.detach()).abs()
        table[name] = {
            "logp_mean": difference.mean().item(),
            "logp_max": difference.max().item(),
            "loss": abs(loss.item() / exact_loss.item() - 1),
            "dX": relative_norm(gradients[0], exact_gradients[0]),
            "dW": relative_norm(gradients[1], exact_gradients[1]),
        }
    return table


def relative_norm(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/loss_error.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    by_seed = [errors(seed, device) for seed in range(arguments.seeds)]
    combine = {"logp_max": max}
    table = {
        name: {
            column: combine.get(column, fmean)([table[name][column] for table in by_seed])
            for column in by_seed[0][name]
        }
        for name in WAYS
    }
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "seeds": arguments.seeds,
        "shape": {"tokens": ROWS * LENGTH, "hidden": HIDDEN, "vocab": VOCAB},
        "errors": table,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in table.items():
        print(f"{name:48}" + "".join(f"{column} {value:9.2e}  " for column, value in row.items()))


if __name__ == "__main__":
    main()

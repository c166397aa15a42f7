"""The policy loss of logits that exist already, forward and backward in place, beside Liger's kernel and PyTorch.

    pytest bench/bench_logits_loss.py

The floor is memory traffic: the logits are read twice and written once, at the speed of a device-to-device copy.
Without a GPU the PyTorch twin competes with plain PyTorch.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch
from liger_kernel.transformers.grpo_loss import triton_grpo_loss as liger_loss
from tempsamp_kernels import triton_grpo_loss
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
ROWS, LENGTH, VOCAB = (8, 1024, 152064) if CUDA else (4, 64, 151936)
ROUNDS = 20 if CUDA else 3
# On a CPU: seconds of this process, since other work may share the machine.
TIMER = time.perf_counter if CUDA else time.process_time
pytestmark = pytest.mark.benchmark(timer=TIMER)
EPSILON, BETA = 0.2, 0.04


def plain_torch(logits, old_logp, ref_logp, completion_ids, advantages, **_) -> tuple[Tensor]:
    """The same loss as users write it: fp32 log-softmax over all logits, then autograd."""
    logps = logits[:, :-1].float().log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    ratio, advantages = (logps - old_logp).exp(), advantages[:, None]
    policy = -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)
    delta = ref_logp - logps
    return ((policy + BETA * (torch.expm1(delta) - delta)).mean(),)


CONTENDERS: dict[str, Callable] = {"ours": triton_grpo_loss, "torch": plain_torch}
if CUDA:
    CONTENDERS["liger"] = liger_loss


def prepared(function: Callable, source: Tensor, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """One forward and backward, which gives the gradient, on a fresh copy of the logits, which may be overwritten."""
    leaf = source.clone().requires_grad_()
    logits = leaf * 1  # the in-place backward of a leaf would spoil it before autograd has stored its gradient
    options = {"temperature": 1.0, "beta": BETA, "eps_low": EPSILON, "eps_high": EPSILON, "loss_type": "bnpo"}

    def run() -> Tensor:
        loss = function(logits, **batch, **options, reduce=True)[0]
        return torch.autograd.grad(loss, logits)[0]

    return run


def step(function: Callable, source: Tensor, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """(seconds, gradient)."""
    run = prepared(function, source, batch)
    if CUDA:
        torch.cuda.synchronize()
    start = TIMER()
    gradient = run()
    if CUDA:
        torch.cuda.synchronize()
    return TIMER() - start, gradient


def make_batch(num_rows: int, length: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [num_rows, length + 1, VOCAB], and the other arguments of the loss."""
    torch.manual_seed(0)
    logits = torch.randn(num_rows, length + 1, VOCAB, device=DEVICE, dtype=DTYPE)
    token_ids = torch.randint(VOCAB, (num_rows, length), device=DEVICE)
    pairs = zip(logits, token_ids, strict=True)
    logps = torch.stack([row[:-1].float().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for row, ids in pairs])
    noise = 0.2 * torch.randn(2, num_rows, length, device=DEVICE)
    advantages = torch.randn(num_rows, device=DEVICE)
    return logits, {
        "old_logp": logps + noise[0],
        "ref_logp": logps + noise[1],
        "completion_ids": token_ids,
        "advantages": advantages,
    }


def copy_seconds(source: Tensor) -> float:
    target = torch.empty_like(source)
    torch.cuda.synchronize()
    start = TIMER()
    target.copy_(source)
    torch.cuda.synchronize()
    return TIMER() - start


def test_forward_and_backward_from_logits(benchmark):
    logits, batch = make_batch(ROWS, LENGTH)
    expected = step(plain_torch, logits, batch)[1]
    for name, function in CONTENDERS.items():
        distance = (step(function, logits, batch)[1].float() - expected.float()).norm() / expected.float().norm()
        assert distance < 1e-2, f"{name}: gradient differs by {distance:.1e}"
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    copies: list[float] = []

    def time_all() -> None:
        for name, function in CONTENDERS.items():
            seconds[name].append(step(function, logits, batch)[0])
        if CUDA:
            copies.append(copy_seconds(logits))

    benchmark.pedantic(partial(step, triton_grpo_loss, logits, batch), setup=time_all, rounds=ROUNDS, warmup_rounds=1)
    medians = {name: median(values[1:]) for name, values in seconds.items()}  # the first is the warm-up round's
    fastest_peer = min(value for name, value in medians.items() if name != "ours")
    benchmark.extra_info.update(
        ms={name: 1e3 * value for name, value in medians.items()}, speedup_over_best_peer=fastest_peer / medians["ours"]
    )
    if CUDA:
        # a copy moves the logits twice, the loss three times
        share = 1.5 * median(copies[1:]) / medians["ours"]
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name(), share_of_copy_bandwidth=share, goals={"share_of_copy_bandwidth": 0.85}
        )

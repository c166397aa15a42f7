"""The policy loss from hidden states, forward and backward, beside what other trainers run.

    pytest bench/bench_grpo_loss.py

Every round times all contenders in turn on the same inputs, after their losses and gradients were checked against each
other. On a CPU the PyTorch implementations compete in fp32; on a GPU all of them in bf16 on the heads of Qwen2.5-VL 3B
and 7B, with three bare cuBLAS GEMMs (2NHV FLOPs each) as the speed of light. `extra_info` has medians, ratios, memory.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from statistics import median

import pytest
import torch
from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
from torch import Tensor
from torch.nn import functional

from bench.gpu_sections.timing import distance, memory
from bench.loss_contenders import (
    Contender,
    LossBatch,
    liger,
    liger_sm90,
    ours,
    quack,
    torch_loss,
    trl,
    trl_logps,
)
from bench.memory import peak_resident_gib
from tempsamp_fast.model.flops import peak_bf16_flops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 10 if CUDA else 3
# On a CPU: seconds of this process, since other work may share the machine.
TIMER = time.perf_counter if CUDA else time.process_time
pytestmark = pytest.mark.benchmark(timer=TIMER)
HEADS = {"3B": (2048, 151936), "7B": (3584, 152064)}
CASES = (
    [pytest.param(n, *head, id=f"{name}-N{n}") for name, head in HEADS.items() for n in (1024, 4096, 8192, 32768)]
    if CUDA
    else [pytest.param(1024, 128, 32768, id="V32k-N1024"), pytest.param(512, 256, 151936, id="V152k-N512")]
)


def make_batch(num_tokens: int, hidden_size: int, vocab_size: int) -> LossBatch:
    """Eight completions; hidden states and weight are leaves."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    hidden = torch.randn(num_tokens, hidden_size, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, device=DEVICE) / hidden_size**0.5).to(dtype)
    token_ids = torch.randint(vocab_size, (num_tokens,), device=DEVICE)
    with torch.no_grad():
        logps = trl_logps(hidden, weight, token_ids)
    noise = torch.randn(2, num_tokens, device=DEVICE) * 0.2
    advantages = torch.randn(8, device=DEVICE)
    return LossBatch(
        hidden.requires_grad_(), weight.requires_grad_(), token_ids, advantages, logps + noise[0], logps + noise[1]
    )


def liger_scaled_cross_entropy(batch: LossBatch) -> Tensor:
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(batch.hidden, batch.weight, batch.token_ids)
    return torch_loss(-(nll[0] if isinstance(nll, tuple) else nll), batch)


def full_logits(batch: LossBatch) -> Tensor:
    logits = functional.linear(batch.hidden, batch.weight).float()
    return torch_loss(logits.log_softmax(1).gather(1, batch.token_ids[:, None])[:, 0], batch)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "trl": trl,
    "liger": liger,
    "liger_scaled_ce": liger_scaled_cross_entropy,
    "torch_compile" if CUDA else "torch": torch.compile(full_logits) if CUDA else full_logits,
}
if CUDA:  # what a machine lacks the package of is left out
    CONTENDERS |= {"liger_sm90": liger_sm90, "quack": quack, "ours_compiled": torch.compile(ours)}
PEERS = CONTENDERS.keys() - {"ours", "ours_compiled"}


def step(contender: Contender, batch: LossBatch) -> list[Tensor]:
    """Loss, dX and dW of one forward and backward, finished when this returns."""
    loss = contender(batch)
    results = [loss.detach(), *torch.autograd.grad(loss, (batch.hidden, batch.weight))]
    if CUDA:
        torch.cuda.synchronize()
    return results


def bare_gemms(batch: LossBatch) -> None:
    """The floor: logits, dX and dW of the whole batch as three cuBLAS calls in bf16."""
    hidden, weight = batch.hidden.detach(), batch.weight.detach()
    logits = hidden @ weight.T
    logits @ weight
    logits.T @ hidden
    torch.cuda.synchronize()


def peak_gib(run: Callable[[], object]) -> float:
    """Memory in use at the worst moment of `run`, less what was in use before it."""
    return memory(run)["peak_gib"] if CUDA else peak_resident_gib(run)


def gradient_distances(batch: LossBatch) -> dict[str, float]:
    """The correctness gate: relative distance of each contender's gradients from ours; none for one that cannot run."""
    expected_loss, *expected = step(ours, batch)
    distances = {}
    for name, contender in CONTENDERS.items():
        with suppress(ImportError, torch.OutOfMemoryError):
            loss, *gradients = step(contender, batch)
            torch.testing.assert_close(loss, expected_loss, rtol=2e-2, atol=2e-3)
            distances[name] = max(map(distance, gradients, expected))
            assert distances[name] < (0.1 if CUDA else 1e-4), name
    return distances


def timed(run: Callable[[], object]) -> float:
    start = TIMER()
    run()
    return TIMER() - start


@pytest.mark.parametrize(("num_tokens", "hidden_size", "vocab_size"), CASES)
def test_forward_and_backward_from_hidden_states(benchmark, num_tokens, hidden_size, vocab_size):
    batch = make_batch(num_tokens, hidden_size, vocab_size)
    distances = gradient_distances(batch)
    runs: dict[str, Callable[[], object]] = {
        name: partial(step, CONTENDERS[name], batch) for name in distances if name != "ours"
    }
    if CUDA:
        runs["bare_gemms"] = partial(bare_gemms, batch)
    seconds: dict[str, list[float]] = {name: [] for name in runs}

    def time_the_others() -> None:
        for name, run in runs.items():
            seconds[name].append(timed(run))

    benchmark.pedantic(step, args=(ours, batch), setup=time_the_others, rounds=ROUNDS, warmup_rounds=1)
    medians = {name: median(values[1:]) for name, values in seconds.items()}  # the first is the warm-up round's
    medians["ours"] = benchmark.stats.stats.median
    peaks = {name: peak_gib(partial(step, CONTENDERS[name], batch)) for name in distances}
    peers = PEERS & distances.keys()
    elements = batch.hidden.numel() + batch.weight.numel()
    owed = (elements * batch.hidden.element_size() + batch.weight.numel() * 4) / 2**30
    flops = 6 * num_tokens * hidden_size * vocab_size
    benchmark.extra_info.update(
        left_out=sorted(CONTENDERS.keys() - distances.keys()),
        ms={name: 1e3 * value for name, value in medians.items()},
        peak_gib=peaks,
        gradient_distance=distances,
        tflops_per_s={name: flops / value / 1e12 for name, value in medians.items()},
        speedup_over_best_peer=min(medians[name] for name in peers) / medians["ours"],
        gib_beyond_gradients_and_fp32_dw=peaks["ours"] - owed,
    )
    if CUDA:
        device = torch.cuda.get_device_name()
        peak = peak_bf16_flops(device)
        benchmark.extra_info.update(
            device=device,
            share_of_bare_gemms=medians["bare_gemms"] / medians["ours"],
            share_of_roofline=flops / medians["ours"] / peak if peak else None,
            goals={"speedup_over_best_peer": 1.25, "share_of_bare_gemms": 0.8, "gib_beyond_gradients_and_fp32_dw": 2},
        )

"""Every Triton kernel, at the heads of 3B and 7B: the trainer's, those of rewards and logits, and the video's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tempsamp_kernels import (
    fused_linear_grpo_loss,
    fused_selective_log_softmax,
    grouped_advantages,
    linear_logprob,
    triton_grpo_loss,
)
from tempsamp_kernels.advantages import SHAPINGS
from torch import Tensor

from bench.gpu_sections.models import HEAD_SHAPES
from bench.rehearsal.ledger import LEDGER
from tempsamp_fast.video import Geometry, normalise_rows
from tempsamp_fast.video.nv12 import Pictures, write_patches

COEFFICIENTS = (128, 76309, 104597, -25675, -53279, 132201)
"""Of a conversion to RGB, as the header of a stream gives them."""


def play() -> None:
    """Compile each of them; what does not compile is a violation."""
    for size, head in HEAD_SHAPES.items():
        weight = torch.empty(head[1], head[0], device="cuda", dtype=torch.bfloat16).requires_grad_()
        for num_tokens in (256, 8192):
            for name, run in of_the_head(weight, num_tokens).items():
                attempt(f"{size} N={num_tokens} {name}", run)
    for shaping in SHAPINGS:
        attempt(f"advantages {shaping}", partial(advantages, shaping))
    attempt("logits", logits)
    for height, width in ((360, 640), (1080, 1920)):
        for stored, wanted in (
            (torch.uint8, torch.bfloat16),
            (torch.uint8, torch.uint8),
            (torch.uint16, torch.bfloat16),
        ):
            attempt(f"nv12 {height}p {stored} to {wanted}", partial(pictures, height, width, stored, wanted))
    attempt("normalise", lambda: normalise_rows(torch.zeros(512, 1176, dtype=torch.uint8).to("cuda"), Geometry()))


def attempt(name: str, run: Callable[[], Any]) -> None:
    with LEDGER.phase(f"kernels: {name}"):
        try:
            run()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            LEDGER.violations.append(f"kernels, {name}: {type(error).__name__}: {str(error)[:300]}")


def of_the_head(weight: Tensor, num_tokens: int) -> dict[str, Callable[[], Any]]:
    """Losses and log-probs of packed tokens, by name."""
    vocab_size, hidden_size = weight.shape
    row_ids = torch.arange(8).repeat_interleave(num_tokens // 8)

    def loss(**options: Any) -> None:
        hidden = torch.empty(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        ids = torch.randint(vocab_size, (num_tokens,)).to("cuda")
        given = {} if options.get("loss_type") == "sft" else {"advantages": torch.linspace(-1, 1, 8)}
        fused_linear_grpo_loss(hidden, weight, ids, row_ids, **given, **options)[0].backward()
        weight.grad = None

    def log_probs(wants_gradient: bool, chunk_size: int | None = None) -> None:
        hidden = torch.empty(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
        ids = torch.randint(vocab_size, (num_tokens,)).to("cuda")
        with torch.set_grad_enabled(wants_gradient):
            logps, entropies = linear_logprob(hidden, weight, ids, chunk_size=chunk_size)
        if wants_gradient:
            (logps.sum() + entropies.sum()).backward()
            weight.grad = None

    some = lambda: torch.empty(num_tokens, device="cuda")
    runs: dict[str, Callable[[], Any]] = {
        "grpo": partial(loss, beta=0.0),
        "grpo, old and reference": lambda: loss(old_logps=some(), ref_logps=some()),
        "sft": partial(loss, loss_type="sft", beta=0.0),
        "log-probs": partial(log_probs, False),
        "log-probs in chunks": partial(log_probs, False, 256),
        "log-probs with gradients": partial(log_probs, True),
        "sequence": lambda: loss(importance_sampling_level="sequence", old_logps=some(), ref_logps=some()),
        "vespo": lambda: loss(loss_type="vespo", old_logps=some()),
    }
    return runs | {name: partial(loss, loss_type=name) for name in ("dapo", "bnpo", "cispo", "sapo", "luspo")}


def advantages(shaping: str) -> None:
    groups = torch.arange(8).repeat_interleave(8).to("cuda")
    off_policy = (torch.arange(64) % 8 == 7).to("cuda")
    grouped_advantages(torch.rand(64).to("cuda"), groups, off_policy, shaping=shaping, impl="triton")


def logits() -> None:
    given = torch.empty(2, 129, 151936, device="cuda", dtype=torch.bfloat16).requires_grad_()
    logps, ids = torch.empty(2, 128, device="cuda"), torch.zeros(2, 128, dtype=torch.int64).to("cuda")
    triton_grpo_loss(given * 1, logps, logps, ids, torch.ones(2).to("cuda"), reduce=True)[0].backward()
    fused_selective_log_softmax(given * 1, ids).sum().backward()


def pictures(height: int, width: int, stored: torch.dtype, wanted: torch.dtype) -> None:
    geometry = Geometry()
    size = geometry.frame_size(64, height, width)
    t, h, w = geometry.grid_thw(64, size)
    surfaces = torch.empty(64, height * 3 // 2, -(-width // 256) * 256, dtype=stored, device="cuda")
    out = torch.empty(t * h * w, geometry.row_width, dtype=wanted, device="cuda")
    write_patches(surfaces, Pictures(height, width, COEFFICIENTS), range(64), geometry, size, out)

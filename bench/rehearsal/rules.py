"""What makes a rehearsal fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.triton_double import COMPILED

ALLOWED_WAITS = {
    "varlen_attention.py groups_heads": "the trial of grouped heads, once per device and dtype",
    "patches.py _mean_and_std": "mean and deviation of pixels, sent once",
    "answers.py Answers.finished:": "which rows still run: the one wait of a token",
    "answers.py Answers.by_prompt:": "the answers, at the end",
    "answers.py Answers.__init__": "noise and ids, before the first token",
    "generate.py generate:": "whether the first logits are finite",
    "generate.py _prefill": "positions of the first tokens, once a rollout",
    "split_attention.py windows_by_size:": "sizes of the tower's windows, once per set of grids; in float32 alone",
    "metrics.py logp_gap:": "the log-probs of a step, after its update",
    "metrics.py LossMetrics.as_dict:": "the metrics of a row, after the update",
    "engine.py optimizer_step:": "whether the gradient's norm is finite",
    "stopwatch.py Stopwatch.lap:": "a lap of the stopwatch",
    "deepspeed/runtime/": "DeepSpeed's step: overflow and norm",
    "deepspeed/accelerator/": "DeepSpeed's sum of a bucket of gradients beside the backward pass",
}
"""Where the CPU may wait for the device, by part of the place, and why it has to."""
UNWATCHED = ("build", "TimeZero-style", "kernels")
"""Phases, by part of the name, whose waits are not ours or come once a run."""
TIMED = (
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel", "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    "chunk_bwd_kernel_dqkwg", "prepare_wy_repr_bwd_kernel",
)  # fmt: skip
"""Kernels of others whose schedule a real card finds by timing: the first one, which is compiled here, may spill."""
MOST = {"launches_per_token": 900, "waits_per_token": 1.0}
PEAK_TOLERANCE = 0.10


def failures(results: Mapping[str, Any]) -> list[str]:
    """Why this rehearsal failed, in one line each; empty where it did not."""
    return [*dict.fromkeys([*LEDGER.violations, *_waits(), *_spills(), *_figures(results, "")])]


def _waits() -> Iterator[str]:
    for name, phase in LEDGER.phases.items():
        if any(part in name for part in UNWATCHED):
            continue
        for what in phase.waits:
            if not any(part in what for part in ALLOWED_WAITS):
                yield f"waits for the device: {what}"


def _spills() -> Iterator[str]:
    for entry in COMPILED.values():
        if entry.name in TIMED:
            continue
        if spilled := entry.resources()["spilled"]:
            yield f"the kernel {entry.name} spills {spilled} bytes of registers"


def _figures(results: Mapping[str, Any], path: str) -> Iterator[str]:
    """Bounds and planned peaks, wherever they stand in the results."""
    for name, most in MOST.items():
        if name == "launches_per_token" and results.get("record_ms"):
            continue  # those inside a graph are one launch
        if results.get(name, 0) > most:
            yield f"{path}: {name} is {results[name]}, at most {most} is allowed"
    planned, peak = results.get("planned_gib"), results.get("peak_gib")
    if planned and abs(peak / planned - 1) > PEAK_TOLERANCE:
        yield f"{path}: a peak of {peak} GiB, where the plan says {planned}"
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{path} / {name}" if path else name)

"""The whole job on one GPU, `deepspeed tempsamp_fast/train.py`: the tiny recipe in bf16, and the 3B shape."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.gpu_sections.child import Record
from bench.gpu_sections.models import model_config, random_model
from bench.gpu_sections.watch import GpuWatch
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.data.prompts import question
from tempsamp_fast.embedded.model import train_tokenizer
from tempsamp_fast.planning.subject import peak_memory

ROOT = Path(__file__).parents[2]
DATA = ["--synthetic_dir=data/gpu", "--synthetic_videos=48,2,8", "--max_eval_samples=0"]
TINY = [*DATA, "--dtype=bfloat16", "--phases=sft/answer+think:20,tempsamp/answer:1000"]
SHAPE_3B = [
    *DATA,
    "--phases=tempsamp/answer:1000",
    "--min_pixels=175616",
    "--max_pixels=175616",
    "--num_generations=8",
    "--max_completion_length=32",
    "--prompts_per_device=4",
    "--max_tokens_per_row=16384",
    "--gradient_checkpointing=true",
    "--learning_rate=1e-6",
    "--beta=0.04",
    "--zero_stage=1",
]
"""224 tokens per second of video, as 3584 tokens for 16 seconds."""
VARIANTS: dict[str, list[str]] = {"3B shape": [], "3B shape, frozen tower": ["--freeze_vision=true"]}
"""The first that fits is run."""
NUM_STEPS, NUM_WARMUP = 20, 3
TIME_LIMIT_S = 430.0
"""Of all recipes together: a section that is stopped from outside would leave its ranks behind."""
PUBLISHED_ROLLOUTS_PER_S = {"Video-R1 7B": 0.15, "EasyR1 7B images, A100": 0.08, "verl 9B, H800": 0.07}
"""Per GPU, as their authors or users report them; other models and machines, so an order of magnitude only."""


def measure(record: Record) -> None:
    ends = time.monotonic() + TIME_LIMIT_S
    record.has("Liger's layers", "liger_kernel")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with record.attempt("tiny recipe"):
            run_recipe(record, "tiny recipe, bf16", Path(folder) / "tiny", TINY, 20 + NUM_STEPS, ends - 250)
        for label, more in VARIANTS.items():
            if record.fits(label, needed_gib([*SHAPE_3B, *more])):
                with record.attempt(label):
                    checkpoint = build_checkpoint(Path(folder) / "model")
                    flags = [*SHAPE_3B, *more, f"--model={checkpoint}"]
                    run_recipe(record, label, Path(folder) / "3b", flags, NUM_STEPS, ends)
                break


def needed_gib(flags: Sequence[str]) -> float:
    """As planned, or while DeepSpeed steps: then gradients lie there once more in bf16 and in fp32, activations not."""
    config = parse_args([*flags, "--model=Qwen/Qwen2.5-VL-3B-Instruct"])
    memory = peak_memory(config, 1)
    step = memory.gradients + 4 / 2 * memory.gradients
    return (memory.total - memory.activations + max(memory.activations, step)) / 2**30


def build_checkpoint(folder: Path) -> Path:
    """Random weights of the 3B shape with a small tokenizer; ids beyond it decode to nothing."""
    tokenizer = train_tokenizer([question("a red circle appears", mode, "grounding") for mode in ("answer", "think")])
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    random_model(model_config("3B", special_ids=ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


def run_recipe(
    record: Record,
    label: str,
    folder: Path,
    flags: Sequence[str],
    num_steps: int,
    ends: float,
) -> None:
    """Train until `num_steps` are logged or `time.monotonic()` is `ends`, then stop before anything large is saved."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=1", "tempsamp_fast/train.py"]
    with GpuWatch() as watch:
        rows = train([*runner, *flags, f"--output_dir={folder}"], folder / "metrics.jsonl", num_steps, ends)
    timed = [row for row in rows if "tempsamp" in row["phase"]][NUM_WARMUP:]
    assert timed, f"{len(rows)} steps logged, none of them to time"
    for row in rows:
        assert math.isfinite(row["loss"]) and math.isfinite(row["optim/grad_norm"]), f"step {row['step']}: {row}"
    names = [name for name in timed[0] if name.startswith(("time/", "perf/"))]
    figures: dict[str, Any] = {name: median(row[name] for row in timed) for name in names}
    steps = [row["time/step_s"] for row in timed]
    config = parse_args(flags)
    num_prompts = config.train.prompts_per_device * config.train.gradient_accumulation_steps
    record.add(
        label,
        **figures,
        spread_s=[min(steps), max(steps)],
        num_steps=len(timed),
        rollouts_per_s=num_prompts * (config.rollout.num_generations - 1) / median(steps),  # one is the ground truth's
        tokens_per_step=median(row["batch/num_tokens"] for row in timed),
        gpu=watch.summary(),
        published_rollouts_per_s=PUBLISHED_ROLLOUTS_PER_S,
    )


def train(command: Sequence[str], metrics: Path, num_steps: int, ends: float) -> list[dict[str, Any]]:
    """Rows of training steps, at least one; the command is killed when there are `num_steps`, or the time is over.

    Killed, since a trainer that is only asked to end saves first.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() < ends and len(logged(metrics)) < num_steps:
            time.sleep(0.5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    rows = logged(metrics)
    if not rows:
        raise RuntimeError(f"training logged no step (exit code {process.returncode})")
    return rows


def logged(metrics: Path) -> list[dict[str, Any]]:
    """Training steps in the log so far, whole lines only."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["phase"] != "eval"]

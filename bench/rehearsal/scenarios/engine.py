"""The trainer's own `update()` behind a DeepSpeed engine of one pretended rank, at full depth or cut."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.scenarios.models import CHECKPOINTS, GRID, PROMPT_LEN, model_of, prompt_of
from bench.step_contenders import random_group
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.learning import update
from tempsamp_fast.learning.engine import build_engine
from tempsamp_fast.learning.vision_features import with_pixels_on, with_vision_features
from tempsamp_fast.model.architectures import count_parameters
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.planning.estimate import Work, step_memory
from tempsamp_fast.system.stopwatch import Stopwatch

COLLECTIVES = ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "reduce",
               "reduce_scatter", "barrier", "all_to_all_single")  # fmt: skip
NUM_ANSWERS, LENGTH, NUM_PROMPTS = 8, 32, 2


def play(stage: int, depth: int | None, frozen: bool = False, num_steps: int = 1) -> dict[str, Any]:
    """Figures of steps of 3B with a reference, two updates a batch, and every layer recomputed.

    In bfloat16; without partitioning, which bfloat16 does not run without on a GPU, in float32.
    """
    dtype = torch.bfloat16 if stage else torch.float32
    flags = [
        "--phases=grpo:3", f"--model={CHECKPOINTS['3B']}", f"--prompts_per_device={NUM_PROMPTS}", "--beta=0.04",
        "--max_tokens_per_row=8192", f"--zero_stage={stage}", f"--dtype={str(dtype)[6:]}", "--updates_per_batch=2",
        "--gradient_checkpointing=true", f"--num_generations={NUM_ANSWERS}", f"--max_completion_length={LENGTH}",
        f"--freeze_vision={'true' if frozen else 'false'}",
    ]  # fmt: skip
    config = parse_args(flags)
    label = f"update() behind ZeRO {stage}{', frozen tower' * frozen}{'' if depth is None else f', {depth} layers'}"
    with pretended_ranks():
        model, reference = model_of("3B", depth, dtype), model_of("3B", depth, dtype).requires_grad_(False)
        for each in (model, reference):
            apply_liger_layers(each, "on")
        model.model.visual.requires_grad_(not frozen)
        policy = Policy(model, gradient_checkpointing=True).train()
        with LEDGER.phase(f"{label}: build"):
            engine = build_engine(policy, config.train, dtype)
        groups = groups_of(engine, frozen)
        LEDGER.peak = LEDGER.live
        with LEDGER.phase(label) as whole:
            for _ in range(num_steps):
                update.update(engine, Policy(reference).eval(), groups, "grpo", config, NUM_PROMPTS, 1e-6, Stopwatch())
        optimizer = type(engine.optimizer).__name__
    figures = {"optimizer": optimizer, **whole.figures()}
    if depth is None:
        work = Work(GRID, PROMPT_LEN, LENGTH, NUM_ANSWERS, NUM_ANSWERS)
        memory = step_memory(work, model.config, count_parameters(model.config, config.model), config, 2, 1)
        figures["planned_gib"] = round(memory.total / 2**30, 2)
    return figures


def groups_of(engine: Any, frozen: bool) -> list[Any]:
    """Two scored groups, their pixels on the card; features in place of them where the tower is frozen."""
    config = engine.module.config
    prompts = with_pixels_on(engine.device, [prompt_of(config, seed) for seed in range(NUM_PROMPTS)])
    if frozen:
        prompts = with_vision_features(engine, prompts)
    groups = [random_group(prompt, LENGTH, NUM_ANSWERS) for prompt in prompts]
    for group in groups:
        group.advantages = torch.linspace(-1, 1, NUM_ANSWERS)
        for completion in group.completions:
            completion.sampled_logps = torch.zeros(LENGTH)
    return groups


@contextmanager
def pretended_ranks(number: int = 1) -> Iterator[None]:
    """A process group whose first rank this is, and whose collectives leave everything as it is."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": str(number),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    done = SimpleNamespace(wait=lambda *_: True, is_completed=lambda: True)
    begin = dist.init_process_group

    def collective(*_: Any, async_op: bool = False, **__: Any) -> Any:
        return done if async_op else None

    def pretended(*_: Any, **__: Any) -> None:
        if dist.is_initialized() and dist.get_world_size() != number:
            dist.destroy_process_group()
            deepspeed.comm.comm.cdb = None
        if not dist.is_initialized():
            begin("fake", store=FakeStore(), rank=0, world_size=number)

    with mock.patch.multiple(dist, init_process_group=pretended, **dict.fromkeys(COLLECTIVES, collective)):
        dist.init_process_group()
        yield

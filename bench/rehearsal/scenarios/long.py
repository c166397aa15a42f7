"""A row of a hundred thousand tokens, run by one rank alone and by eight that share it (`--sequence_parallel_size`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import deepspeed
import torch

from bench.gpu_sections.models import UNSTEPPED
from bench.gpu_sections.update import losses
from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.scenarios.engine import pretended_ranks
from bench.rehearsal.scenarios.models import CHECKPOINTS, model_of
from bench.rehearsal.scenarios.updates import planned_gib
from bench.step_contenders import make_prompt, random_group
from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Prompt
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.sequence_parallel import check_sequence_parallel, share_out
from tempsamp_fast.planning.estimate import TEXT_TOKENS, Work

GRID = (446, 28, 32)
"""Of a video of half an hour at one frame in two seconds: 99,904 tokens."""
NUM_ANSWERS, LENGTH = 8, 32


def play(size: str, num_ranks: int) -> dict[str, Any]:
    """Figures of one rank's share of an update, every layer recomputed; what is exchanged takes no time here."""
    flags = ["--phases=grpo:1", *UNSTEPPED, f"--model={CHECKPOINTS[size]}", "--gradient_checkpointing=true"]
    flags += [f"--sequence_parallel_size={num_ranks}", f"--max_tokens_per_row={10**9}", "--prompts_per_device=1"]
    settings = parse_args(flags)
    model = model_of(size)
    apply_liger_layers(model, "on")
    policy = Policy(model, gradient_checkpointing=settings.model.gradient_checkpointing).train()
    for parameter in policy.parameters():
        parameter.grad = torch.empty_like(parameter)
    prompt = long_prompt()
    group = random_group(prompt, LENGTH, NUM_ANSWERS)
    (row,) = pack([group], config=policy.config, max_tokens_per_row=10**9)
    with pretended_ranks(num_ranks):
        if num_ranks > 1:
            deepspeed.init_distributed(auto_mpi_discovery=False)
            check_sequence_parallel(num_ranks, policy.config)
            row = share_out(row, None, policy.config)
        own = row.to("cuda")
        (run,) = losses(policy, [own])
        with LEDGER.phase(f"{size} long row, {num_ranks} ranks") as whole:
            run().backward()
    work = Work(GRID, len(prompt.input_ids), LENGTH, NUM_ANSWERS, num_sampled=0)  # of the update alone
    planned = planned_gib(work, policy.config, settings)
    return {"tokens": row.input_ids.shape[1], **whole.figures(), "planned_gib": planned}


def long_prompt() -> Prompt:
    """On the CPU, pixels in uint8 as the trainer's loader gives them."""
    t, h, w = GRID
    prompt = make_prompt(t * h * w // 4 + TEXT_TOKENS, GRID)
    return replace(prompt, video=replace(prompt.video, pixel_values=prompt.video.pixel_values.to(torch.uint8)))

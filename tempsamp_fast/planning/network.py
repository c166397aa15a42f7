"""What ranks say to each other in a step, how long a network takes for it, and what a step takes on many GPUs.

Bandwidths and what is assumed of them are arguments; nothing here is measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tempsamp_fast.config import Config
from tempsamp_fast.learning.balance import assign_groups
from tempsamp_fast.learning.deepspeed_settings import deepspeed_config
from tempsamp_fast.model.architectures import Parameters
from tempsamp_fast.planning.estimate import Work
from tempsamp_fast.planning.forecast import Forecast

REUSE_DISTANCE = 1_000_000_000
"""Elements: DeepSpeed's default of stage3_max_reuse_distance. A weight needed again sooner stays gathered."""
PREFETCHED = 50_000_000
"""Elements: DeepSpeed's default of stage3_prefetch_bucket_size. What it looks ahead to stays gathered too."""
PATCH_BYTES = 3 * 2 * 14 * 14
"""Of a patch as uint8, two frames of 14 x 14 pixels."""
LEAST_EFFICIENCY = 0.8
MOST_GPUS = 4096
NUM_DRAWS = 20
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Message:
    """A collective of a step; `num_bytes` of the whole: what is reduced, or what every rank has in the end."""

    phase: Literal["rollout", "update", "optimizer"]
    kind: Kind
    num_bytes: float
    is_beside: bool = False
    """Whether it goes on beside the phase's computing."""

    def sent(self, world_size: int) -> float:
        """Bytes that each rank sends, in rings."""
        return (2 if self.kind == "all_reduce" else 1) * self.num_bytes * (world_size - 1) / world_size


def step_messages(
    work: Work, parameters: Parameters, config: Config, bytes_per_value: int, num_rows: int
) -> list[Message]:
    """Of one step, but for figures and texts of a few kilobytes.

    Stages 0 to 2 reduce the gradients, once or in every row, and 1 and 2 hand back the weights. Stage 3 gathers weights
    for every row, again for its backward pass but for those that stay, for the reference's pass, for the tower by
    itself where that is frozen, and for a rollout once or in every pass, one a token.

    num_rows: of one device.
    """
    train, b = config.train, bytes_per_value
    zero = deepspeed_config(train, torch.float32)["zero_optimization"]
    stage, trained = zero["stage"], float(b * parameters.trained(config.model))
    is_beside = bool(zero.get("overlap_comm", stage == 3))
    moved = [Message("rollout", "all_to_all", math.prod(work.grid_thw) * PATCH_BYTES)]
    if stage < 3:
        times = num_rows if stage == 2 and train.reduce_gradients == "row" else 1
        reduced = [Message("update", "all_reduce", trained, is_beside)] * times
        return moved + reduced + ([Message("optimizer", "all_gather", trained)] if stage else [])
    tower = parameters.vision if config.model.freeze_vision else 0
    read = parameters.total - tower
    ahead = zero.get("stage3_prefetch_bucket_size", PREFETCHED)
    again = max(0.0, read - max(ahead, zero.get("stage3_max_reuse_distance", REUSE_DISTANCE)) / 2)
    rows = [
        Message("update", "all_gather", b * (read + again), True),
        Message("update", "reduce_scatter", trained, True),
    ]
    if config.algorithm.beta > 0 and work.num_sampled:  # the reference's pass
        rows.append(Message("update", "all_gather", b * read, True))
    encoded = [Message("rollout", "all_gather", b * tower, True)] * num_rows * (tower > 0)
    passes = 1 if config.rollout.gather_weights != "layer" else 1 + work.answer_len
    drawn = [Message("rollout", "all_gather", b * parameters.total)] * (passes if work.num_sampled else 0)
    return moved + encoded + drawn + rows * num_rows


@dataclass(frozen=True)
class Network:
    """Links between GPUs, one way and per GPU."""

    node_gpus: int = 8
    nvlink_gbs: float = 450.0
    """H100 SXM: 900 GB/s both ways (NVIDIA's data sheet)."""
    network_gbs: float = 50.0
    """A 400 Gb/s InfiniBand adapter for each GPU (NVIDIA's data sheet of DGX H100)."""
    share: float = 0.8
    """Of these that collectives reach: assumed."""
    hop_us: float = 5.0
    """From one GPU to the next: assumed."""

    def seconds(self, message: Message, world_size: int) -> float:
        """Rings cross nodes through all adapters of a node together; an exchange through each GPU's own."""
        if world_size == 1:
            return 0.0
        gbs = self.nvlink_gbs
        if world_size > self.node_gpus:
            gbs = min(gbs, self.network_gbs * (1 if message.kind == "all_to_all" else self.node_gpus))
        return message.sent(world_size) / (self.share * gbs * 1e9) + 2 * math.log2(world_size) * self.hop_us * 1e-6


@dataclass(frozen=True)
class Step:
    """Seconds of a step on `num_gpus` GPUs, each with the same share of prompts."""

    num_gpus: int
    rollout_s: float
    update_s: float
    waiting_s: float
    """For the rank with the most tokens, in rollout and update."""
    network_s: float
    """That nothing is computed beside."""

    @property
    def seconds(self) -> float:
        return self.rollout_s + self.update_s + self.waiting_s + self.network_s


def step_on(
    num_gpus: int, one: Forecast, messages: Sequence[Message], num_rows: int, tokens: Sequence[int], network: Network
) -> Step:
    """tokens: of every prompt that may come, from which steps are drawn. one: of a GPU by itself."""
    network_s = 0.0
    for phase, computing_s in (("rollout", one.sampling_s), ("update", one.update_s), ("optimizer", 0.0)):
        of_phase = [each for each in messages if each.phase == phase]
        alone, beside = (
            sum(network.seconds(each, num_gpus) for each in of_phase if each.is_beside == is_beside)
            for is_beside in (False, True)
        )
        reduced_last = all(each.kind == "all_reduce" for each in of_phase if each.is_beside)
        # What is reduced once goes beside the last row's backward pass, two thirds of it.
        hidden_s = computing_s * (2 / 3 * len([e for e in of_phase if e.is_beside]) / num_rows if reduced_last else 1.0)
        network_s += alone + max(0.0, beside - hidden_s)
    idle = idle_share(tokens, num_gpus, num_rows)
    waiting_s = (one.sampling_s + one.update_s) * idle / (1 - idle)
    return Step(num_gpus, one.sampling_s, one.update_s, waiting_s, network_s)


def idle_share(tokens: Sequence[int], num_gpus: int, num_prompts: int) -> float:
    """1 - mean / max of tokens over ranks, mean over steps that are drawn and dealt as a run deals them."""
    dice, shares = random.Random(0), []
    for _ in range(NUM_DRAWS):
        drawn = dice.choices(tokens, k=num_gpus * num_prompts)
        loads = [sum(drawn[each] for each in of_rank) for of_rank in assign_groups(drawn, num_gpus)]
        shares.append(1 - sum(loads) / num_gpus / max(loads))
    return sum(shares) / len(shares)


def describe_scale(
    most: int, one: Forecast, messages: Sequence[Message], num_rows: int, tokens: Sequence[int], network: Network
) -> list[str]:
    """A table of 1, 8, 64, ... and `most` GPUs, and where the efficiency falls below `LEAST_EFFICIENCY`."""
    on = lambda number: step_on(number, one, messages, num_rows, tokens, network)
    alone = on(1).seconds
    lines = [f"{'GPUs':>6}{'rollout s':>11}{'update s':>10}{'waiting s':>11}{'network s':>11}{'step s':>9}"
             f"{'efficiency':>12}"]  # fmt: skip
    for number in sorted({min(8**power, most) for power in range(1 + math.ceil(math.log(most, 8)))} | {most}):
        step = on(number)
        cells = step.rollout_s, step.update_s, step.waiting_s, step.network_s, step.seconds
        figures = "".join(f"{cell:>{w}.2f}" for cell, w in zip(cells, (11, 10, 11, 11, 9), strict=True))
        lines.append(f"{number:>6}{figures}{100 * alone / step.seconds:>10.0f} %")
    sizes = [2**power for power in range(1, 1 + int(math.log2(MOST_GPUS)))]
    ends = next((number for number in sizes if alone / on(number).seconds < LEAST_EFFICIENCY), None)
    where = (
        f"falls below {LEAST_EFFICIENCY:.0%} at {ends}"
        if ends
        else f"stays above {LEAST_EFFICIENCY:.0%} to {MOST_GPUS}"
    )
    return [*lines, f"the efficiency {where} GPUs"]

"""What a run will take: `python -m tempsamp_fast.plan --config RECIPE --gpus 8 --nodes 2`, or `train.py --dry_run`.

Everything is an estimate by arithmetic, from settings, annotations and the model's shape: no weights are read, of the
videos at most the header of one, and the data need not be there. Step times are expected only from figures measured on
one GPU (`--measured`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import Config, parse_phases, prompts_per_step
from tempsamp_fast.config.setting import require
from tempsamp_fast.data.catalogue import DATASETS, load_training_data
from tempsamp_fast.data.prompt_file import read_prompt_file
from tempsamp_fast.learning.deepspeed_settings import effective_zero, least_zero_stage
from tempsamp_fast.learning.own_rewards import reward_function, reward_terms, try_rewards
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.model.flops import GPUS, known_gpu
from tempsamp_fast.model.sequence_parallel import check_sequence_parallel
from tempsamp_fast.planning.estimate import (
    FRAME_SIZE,
    TEXT_TOKENS,
    largest,
    step_flops,
    work_of,
)
from tempsamp_fast.planning.forecast import Forecast, Measured, describe, forecast, read_measured
from tempsamp_fast.planning.look import look_at_prompts, look_for_all_videos
from tempsamp_fast.planning.network import Network, describe_scale, step_messages
from tempsamp_fast.planning.subject import (
    Data,
    are_here,
    peak_memory,
    rollout_memory,
    training_data,
    value_size,
    video_grids,
    with_stage,
)
from tempsamp_fast.run.checkpoint import model_folder
from tempsamp_fast.run.schedule import in_steps
from tempsamp_fast.system.files import escaped, log_printably, one_line

logger = logging.getLogger(__name__)
SHORTEST_ANSWER = {"answer": 20, "think": 45}
"""Tokens of the shortest useful answers: the span in its tags, and the template that thinks before it."""
GIB = 2**30
NETWORK = {
    "node_gpus": "GPUs of a node, which NVLink joins",
    "nvlink_gbs": "GB/s of a GPU to others of its node, one way; H100 SXM",
    "network_gbs": "GB/s of a GPU's adapter to other nodes; InfiniBand of 400 Gb/s",
    "share": "of these bandwidths that collectives reach; assumed",
    "hop_us": "microseconds from one GPU to the next; assumed",
}
"""What the options of the network mean, by field of `Network`."""


def decided(config: Config, world_size: int, gpu: str | None = None) -> Config:
    """The settings with a run folder as `model` taken for its newest checkpoint, and `zero_stage="auto"` chosen.

    That is the least stage that can offload what is asked for and whose `peak_memory` leaves a tenth of the card free:
    of `gpu`, a name of `flops.GPUS`, else of this machine's; without a card the first. Stage 0 of a bfloat16 run
    on a GPU becomes 1, which is told, as is what `gather_weights="auto"` becomes under stage 3.
    """
    config = copy.deepcopy(config)
    config.model.model = model_folder(config.model.model)
    card = card_bytes(gpu)
    dtype = torch.bfloat16 if value_size(config.model) == 2 else torch.float32
    least: Any = str(least_zero_stage(dtype, has_gpu=card < math.inf))
    if config.train.zero_stage == "0" != least:
        logger.info("zero_stage=0: bfloat16 on a GPU takes 1, for the optimizer that runs on a CPU too")
        config.train = dataclasses.replace(config.train, zero_stage=least)
    if config.train.zero_stage == "auto":
        found = training_data(config.data) if card < math.inf else None
        asked = config.train.offload
        first: Any = str(max(int(least), {"none": 0, "optimizer": 1, "all": 3}[asked]))
        config.train.zero_stage = first
        for stage, offload in ((first, asked), ("2", asked), ("3", asked), ("3", "all")):
            if stage < first:
                continue
            tried: dict[str, Any] = {"zero_stage": stage, "offload": offload}
            config.train = dataclasses.replace(config.train, **tried)
            if found is None or peak_memory(config, world_size, found).total < 0.9 * card:
                break
    if config.train.reduce_gradients == "auto" and effective_zero(config.train)[0] == 2:
        config.train.reduce_gradients = "step"
        needed = peak_memory(config, world_size).total if card < math.inf else 0.0
        config.train.reduce_gradients = "step" if needed < 0.9 * card else "row"
        _tell("reduce_gradients", f"gradients are summed once a {config.train.reduce_gradients}", needed, card)
    if config.rollout.gather_weights == "auto" and effective_zero(config.train)[0] == 3:
        needed = rollout_memory(config, world_size) if card < math.inf else 0.0
        config.rollout.gather_weights = "rollout" if needed < 0.9 * card else "layer"
        how = "once for a rollout" if needed < 0.9 * card else "layer by layer in every pass of a rollout"
        _tell("gather_weights", f"weights are gathered {how}", needed, card)
    return config


def card_bytes(gpu: str | None) -> float:
    """Memory of a GPU by its name in `flops.GPUS`, else of this machine's; infinite where there is none."""
    if gpu:
        return 1e9 * GPUS[gpu][1]
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else math.inf


def describe_fit(config: Config, world_size: int, found: Data, card: float) -> str:
    """Whether the settings leave a tenth of the card free; else which change of one of them would."""

    def needed(**changes: Any) -> float:
        changed = copy.deepcopy(config)
        for name, value in changes.items():
            part = changed.model if hasattr(changed.model, name) else changed.train
            setattr(part, name, value)
        return peak_memory(changed, world_size, found).total

    planned = needed()
    total = f"{planned / GIB:.3g} of {card / GIB:.3g} GiB"
    if planned < 0.9 * card:
        return f"fits: {total}"
    choices: dict[str, dict[str, Any]] = {
        "--gradient_checkpointing true": {"gradient_checkpointing": True},
        "--zero_stage 3 --offload all": {"zero_stage": "3", "offload": "all"},
        "--lora_rank 16": {"lora_rank": 16},
        "--lora_rank 16 --gradient_checkpointing true": {"lora_rank": 16, "gradient_checkpointing": True},
    }
    fitting = [words for words, changes in choices.items() if needed(**changes) < 0.9 * card]
    what = (
        f"fits with {' or '.join(fitting)}" if fitting else "so with fewer tokens (--total_pixels) or a smaller model"
    )
    return f"does not fit, with a tenth left free: {total}; {what}"


def _tell(setting: str, what: str, needed: float, card: float) -> None:
    why = f"whole ones would make it {needed / GIB:.3g} of {card / GIB:.3g} GiB" if needed else "no card limits it"
    logger.info("%s: %s, as %s", setting, what, why)


def look_before(config: Config) -> None:
    """Say what `decided` settings would stumble over: own rewards and prompts, missing videos, too long a prompt.

    Raises ValueError for it, for samples where `on_bad_sample` does, and for a file or a folder that is not there.
    """
    data = config.data
    if data.prompt_file:
        read_prompt_file(data.prompt_file)
    for term in reward_terms(config.algorithm, data.task):
        reward_function(term)
    for name in ("annotations", "eval_annotations"):
        given = getattr(data, name)
        if given not in (None, "synthetic", *DATASETS) and not Path(given).is_file():
            raise ValueError(f"{name}={given!r}: no such file, and no data set of {', '.join(DATASETS)}")
    if data.annotations != "synthetic" and are_here(data):
        train, held_out = load_training_data(data)
        try_rewards(config.algorithm, data.task, train)
        look_for_all_videos(data, train, held_out)
        look_at_prompts([*train, *held_out], data, model_config(config.model), config.train.max_tokens_per_row)


def describe_plan(
    config: Config,
    world_size: int,
    gpu: str | None = None,
    measured: Measured | None = None,
    network: Network | None = None,
) -> str:
    """The plan as text, for `world_size` devices.

    gpu: a name of `flops.GPUS`, whose peak gives the least time that the FLOPs can take, and whose memory
    says whether they fit; without one, that of this machine's does.
    measured: what step times are expected from; None expects none.
    network: with `measured`, for a table of what steps take on 1, 8, 64, ... devices.
    Raises ValueError for rows that so many devices cannot share (`sequence_parallel_size`).
    """
    shape, found = model_config(config.model), training_data(config.data)
    sharing = config.train.sequence_parallel_size
    check_sequence_parallel(sharing, shape)
    require(world_size % sharing == 0, "sequence_parallel_size", sharing, f"a divisor of {world_size} devices")
    parameters, b = count_parameters(shape, config.model), value_size(config.model)
    grids = video_grids(config.data, found, shape)
    tokens = [t * h * w // 4 for t, h, w in grids]
    known = f"{sum(tokens) / len(tokens):.0f} on average, " if found.durations_s else ""
    size = f"{FRAME_SIZE[1]} x {FRAME_SIZE[0]}"
    lines = [
        f"An estimate for {world_size} device(s), {'bfloat16' if b == 2 else 'float32'}; nothing was loaded.",
        f"model    {config.model.model}: {parameters.total / 1e9:.3f} B parameters, "
        f"{parameters.trained(config.model) / 1e9:.3f} B trained",
        f"samples  {'unknown' if found.num_samples is None else found.num_samples} ({found.note})",
        f"video    {known}at most {max(tokens)} tokens of a prompt (frames taken to be {size})",
    ]
    longest_prompt, budget = max(tokens) + TEXT_TOKENS, config.train.max_tokens_per_row
    if longest_prompt > budget:
        lines.append(
            f"rows     a prompt of {longest_prompt} tokens is longer than max_tokens_per_row={budget}: a run refuses "
            "it; raise that, or lower total_pixels or max_frames"
        )
    phases = in_steps(parse_phases(config.train.phases), config.train, found.num_samples or 0, world_size)
    longest, together = config.rollout.max_completion_length, found.together(config.train.queries_per_video)
    if config.train.queries_per_video > 1:
        lines.append(f"trees    {together:.2g} questions about a video share it in a row, on average")
    forecasts: list[Forecast] = []
    for phase in phases:
        per_step = prompts_per_step(config.train, phase, world_size)
        per_device = prompts_per_step(config.train, phase, 1)
        short = min(longest, min(SHORTEST_ANSWER[mode] for mode in phase.modes))
        least, most = (
            work_of(largest(grids), shape, phase.method, config.rollout.num_generations, length, together)
            for length in (short, longest)
        )
        flops = [step_flops(work, shape, config, phase.method, per_device) for work in (least, most)]
        messages = [step_messages(work, parameters, config, b, per_device) for work in (least, most)]
        traffic = [sum(each.sent(world_size) for each in of_step) for of_step in messages]
        num_steps = phase.num_steps or f"{phase.num_epochs:g} epochs of unknown length in"
        lines += [
            f"phase    {phase}: {num_steps} steps of {per_step} prompts; a prompt and its answers are "
            f"{least.num_tokens} tokens with {short} an answer, {most.num_tokens} with {longest}",
            f"         {flops[0] / 1e12:.3g} to {flops[1] / 1e12:.3g} TFLOP per device and step, "
            f"{traffic[0] / GIB:.3g} to {traffic[1] / GIB:.3g} GiB sent",
        ]
        if gpu:
            seconds = [each / (GPUS[gpu][0] * 1e12) for each in flops]
            lines.append(f"         {seconds[0]:.3g} to {seconds[1]:.3g} s at the {gpu}'s peak: a floor, no forecast")
        if measured:
            low, high = (forecast(measured, work, shape, config, phase.method, per_device) for work in (least, most))
            forecasts += [low, high]
            lines.append(
                f"         {low.seconds:.3g} to {high.seconds:.3g} s expected per step, of which sampling takes "
                f"{low.sampling_s:.3g} to {high.sampling_s:.3g}"
            )
            if network and world_size > 1:
                lengths = [each + least.num_tokens - max(tokens) for each in tokens]
                table = describe_scale(world_size, low, messages[0], per_device, lengths, network)
                lines += [f"         predicted with {short} tokens an answer:", *(f"         {line}" for line in table)]
    expected = describe(measured, forecasts) if measured else "none expected: no measurement was given (--measured)"
    if measured and gpu and known_gpu(measured.gpu) != gpu:
        expected += f"; these are not times of the {gpu} asked for"
    lines.append(f"time     {expected}")
    lines.append("memory   GiB per device at the worst moment, answers as long as they may be:")
    lines.append(f"         {'ZeRO':<36}{'weights':>9}{'reference':>11}{'gradients':>11}{'optimizer':>11}{'buffers':>9}"
                 f"{'activations':>13}{'total':>8}{'off GPU':>9}")  # fmt: skip
    stage, offloaded = effective_zero(config.train)
    chosen = f"{stage}, offload {'+'.join(sorted(offloaded)) or 'none'} (chosen)"
    rows = [(chosen, config), *((str(stage), with_stage(config, stage)) for stage in range(4))]
    for name, settings in rows:
        memory = peak_memory(settings, world_size, found)
        figures = [memory.weights, memory.reference, memory.gradients, memory.optimizer, memory.buffers]
        cells = [*figures, memory.activations, memory.total, memory.off_gpu]
        widths = (9, 11, 11, 11, 9, 13, 8, 9)
        lines.append(f"         {name:<36}" + "".join(f"{c / GIB:>{w}.2f}" for c, w in zip(cells, widths, strict=True)))
    if (card := card_bytes(gpu)) < math.inf:
        lines.append(f"         {describe_fit(config, world_size, found, card)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; every flag of train.py is understood too. Exit code 2 and one line on stderr for bad input."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1, help="in all, or of each node with --nodes")
    parser.add_argument("--nodes", type=int, default=1)
    for name, what in NETWORK.items():
        default = getattr(Network, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{what} (default: {default})")
    parser.add_argument("--gpu", choices=GPUS, help="choose for its memory, and say the least time, at its peak")
    parser.add_argument(
        "--measured",
        type=Path,
        help="results of bench/gpu.py, to expect step times from: bench/results/<gpu>.json; or of make rehearse",
    )
    parser.epilog = "All other words are settings of train.py, such as --config charades_qwen2_5_vl_7b --zero_stage 3."
    options, words = parser.parse_known_args(arguments)
    try:
        if options.gpus < 1 or options.nodes < 1:
            raise ValueError(f"--gpus {options.gpus} --nodes {options.nodes}: must be at least 1")
        measured = read_measured(options.measured) if options.measured else None
        world_size = options.gpus * options.nodes
        network = Network(**{name: getattr(options, name) for name in NETWORK})
        if min(vars(network).values()) <= 0:
            raise ValueError(f"{network}: every number must be positive")
        if network.share > 1:
            raise ValueError(f"--share {network.share}: at most 1, which is all of the bandwidths")
        config = decided(parse_args(words), world_size, options.gpu)
        print(escaped(describe_plan(config, world_size, options.gpu, measured, network)))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The run itself: phases, optimizer, distribution, records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tempsamp_fast.config.phases import MODES, Phase, parse_phases
from tempsamp_fast.config.setting import require, require_types, setting

MAX_SEED = 2**40
"""Generators take 64 bits, of which the step or the epoch needs some."""


@dataclass
class TrainConfig:
    """The run: phases, optimizer, distribution, records."""

    phases: str = setting(
        "sft:300,tempsamp/answer:150,tempsamp/think:150",
        "method[/mode[+mode]]:steps[@rate], ...; steps may be epochs (sft:2epochs); methods sft, grpo, "
        "tempsamp; modes answer, think",
    )
    output_dir: str = setting("runs/tiny", "folder that the run writes")
    resume: str | None = setting(None, "continue the run in this folder")
    dry_run: bool = setting(False, "print the plan (samples, steps, memory, FLOPs) and stop")
    seed: int = setting(0, "seed of data order, crops, sampling and fresh weights")
    prompts_per_device: int = setting(1, "prompts per device and micro-step", unit="prompts", source="paper: 1")
    sft_prompts_per_device: int | None = setting(
        None, "prompts per device and micro-step in sft phases; None: prompts_per_device", unit="prompts"
    )
    queries_per_video: int = setting(
        1,
        "most queries of one video that are asked in the same micro-step, which then share it in rollout and update; "
        "prompts_per_device must be a multiple; 1: the paper's order",
        unit="queries",
    )
    gradient_accumulation_steps: int = setting(
        2, "micro-steps per optimizer step", unit="micro-steps", source="paper: 2"
    )
    max_tokens_per_row: int = setting(32768, "token budget of one packed row", unit="tokens")
    sequence_parallel_size: int = setting(
        1,
        "neighbouring ranks that run each row of an update together, every one a share of its tokens and frames "
        "(Ulysses): for rows longer than one GPU holds; models whose layers all attend",
        unit="ranks",
    )
    packing: Literal["shared_prefix", "none"] = setting(
        "shared_prefix", "a prompt once for all of its answers, or a row for each answer with the prompt again"
    )
    learning_rate: float = setting(1e-6, "peak of the schedule", source="paper: 1e-6")
    lr_schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "course of the learning rate within each phase"
    )
    warmup_ratio: float = setting(
        0.05, "share of each phase's steps in which the learning rate rises from 0", source="the paper's release: .05"
    )
    weight_decay: float = setting(0.0, "weight decay of AdamW", source="the paper's release: .01")
    adam_beta2: float = setting(0.999, "second-moment decay of AdamW")
    max_grad_norm: float = setting(1.0, "clips the norm of the whole gradient; 0: off", source="the paper's release: 1")
    zero_stage: Literal["auto", "0", "1", "2", "3"] = setting(
        "0",
        "what DeepSpeed partitions over ranks: nothing, optimizer, gradients too, weights too; auto: the least that "
        "the plan fits into the card, with offload all where nothing else does",
        source="paper: 3",
    )
    offload: Literal["none", "optimizer", "all"] = setting(
        "none",
        "to CPU memory: the optimizer's state (zero_stage 1 and up), or parameters too (zero_stage 3)",
        source="paper: all",
    )
    reduce_gradients: Literal["auto", "step", "row"] = setting(
        "auto",
        "how often zero_stage 2 sums gradients over ranks: once a step, whole gradients lying on each GPU between its "
        "rows, or in every row; auto: once where the plan fits them",
    )
    deepspeed_config: str | None = setting(
        None, "JSON merged over the generated config, as far as the run does not decide it: a file, or zero2, ..."
    )
    eval_modes: str = setting("answer", "modes evaluated after each phase, such as answer+think")
    eval_batch_size: int = setting(64, "queries asked together in an evaluation, per rank", unit="queries")
    eval_steps: int = setting(0, "evaluate every so many steps of a run too; 0: after each phase alone", unit="steps")
    best_metric: str | None = setting(
        None,
        "what keep_best goes by: [mode/]metric, such as think/r1@0.5; None: the first one (mIoU), in the mean of the "
        "modes",
    )
    eval_start: bool = setting(True, "evaluate before the first step too")
    save_steps: int = setting(
        0, "checkpoint every so many; 0: at the end of each phase, and every save_minutes", unit="steps"
    )
    save_minutes: float = setting(30.0, "checkpoint after the step at which this time has passed; 0: off", unit="min")
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", unit="checkpoints")
    keep_best: bool = setting(True, "keep the checkpoint of the best evaluation too: RUN/best as a model")
    max_skipped_steps: int = setting(
        5, "steps in a row whose loss or gradient may be non-finite; they are skipped", unit="steps"
    )
    stall_timeout_s: float = setting(
        1800.0, "seconds after which a silent rank, or no progress of any, ends the run", unit="s"
    )
    stop_grace_s: float = setting(
        30.0, "seconds from SIGTERM or Ctrl-C until the end, even without a checkpoint", unit="s"
    )
    show_completions: int = setting(
        50, "show the answers to a prompt with their rewards on the console every so many; 0: never", unit="steps"
    )
    log_completions: int = setting(
        1, "of every step, groups whose answers groups.jsonl keeps as text of at most 1,000 characters", unit="groups"
    )
    local_rank: int = setting(0, "set by the deepspeed launcher")

    def __post_init__(self) -> None:
        parse_phases(str(self.phases))
        require_types(self)
        for name in (
            "prompts_per_device", "sft_prompts_per_device", "gradient_accumulation_steps", "max_tokens_per_row",
            "eval_batch_size", "keep_checkpoints", "queries_per_video", "sequence_parallel_size",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for name in ("prompts_per_device", "sft_prompts_per_device"):
            whole = (getattr(self, name) or 0) % self.queries_per_video == 0
            require(whole, name, getattr(self, name), f"a multiple of queries_per_video={self.queries_per_video}")
        rate = self.learning_rate
        require(rate > 0 and math.isfinite(rate), "learning_rate", rate, "positive")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "zero or more")
        require(0 <= self.adam_beta2 < 1, "adam_beta2", self.adam_beta2, "in [0, 1)")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "zero (off) or more")
        require(abs(self.seed) < MAX_SEED, "seed", self.seed, f"between -{MAX_SEED} and {MAX_SEED}")
        for name in ("save_steps", "save_minutes", "eval_steps", "show_completions", "log_completions"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        require(self.max_skipped_steps >= 0, "max_skipped_steps", self.max_skipped_steps, "zero or more")
        for name in ("stall_timeout_s", "stop_grace_s"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for mode in self.eval_modes.split("+"):
            require(mode in MODES, "eval_modes", self.eval_modes, f"modes of {', '.join(MODES)} joined by +")
        if self.best_metric is not None:
            mode = self.best_metric.rpartition("/")[0]
            modes = self.eval_modes.split("+")
            require(mode in ("", *modes), "best_metric", self.best_metric, f"[mode/]metric with a mode of {modes}")


def prompts_per_row(train: TrainConfig, phase: Phase) -> int:
    """Prompts per device and micro-step."""
    return (train.sft_prompts_per_device if phase.method == "sft" else None) or train.prompts_per_device


def prompts_per_step(train: TrainConfig, phase: Phase, world_size: int) -> int:
    """Prompts per optimizer step, of all devices."""
    return prompts_per_row(train, phase) * train.gradient_accumulation_steps * world_size

"""Everything a run is made of, built from its configuration: data, model, engine, sampler, records."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.config import Config, parse_phases
from tempsamp_fast.data.catalogue import load_training_data
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.data.prefetch import Prefetch
from tempsamp_fast.data.prompts import off_policy_text, question
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.embedded.videos import SyntheticConfig
from tempsamp_fast.embedded.videos import generate as generate_videos
from tempsamp_fast.learning.engine import (
    Forward,
    build_engine,
    is_partitioned,
    learning_rate,
    load_engine,
    partitioned_loading,
)
from tempsamp_fast.learning.groups import RecordedRollouts, answer
from tempsamp_fast.learning.reference import adapter_reference, frozen_reference
from tempsamp_fast.learning.universal import loadable_state
from tempsamp_fast.learning.update import update
from tempsamp_fast.learning.vision_features import tower_fingerprint, with_vision_features
from tempsamp_fast.model.attention import check_attention_core
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.model.loading import load_model, resolve_dtype
from tempsamp_fast.model.lora import (
    REFERENCE,
    TRAINED,
    add_adapters,
    add_reference,
    base_checkpoint,
    remember_reference,
)
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.backends import PolicyBackend, RolloutBackend
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.run.checkpoint import (
    ENGINE,
    MODEL,
    check_reference,
    checkpoints,
    save_checkpoint,
    save_reference,
    sound_checkpoint,
)
from tempsamp_fast.run.log import RunLog, drop_rows_from
from tempsamp_fast.run.resume import check_same_run, facts_of
from tempsamp_fast.run.schedule import PhaseStep, in_steps, plan, prompts_per_row, prompts_per_step
from tempsamp_fast.run.skipped_steps import SkippedSteps
from tempsamp_fast.sample import Sample
from tempsamp_fast.system.device import training_device
from tempsamp_fast.system.heartbeat import GracefulStop, Heartbeat
from tempsamp_fast.system.ranks import barrier, made_by_first_rank, num_ranks, own_rank
from tempsamp_fast.system.stopwatch import Stopwatch

REFERENCE_MODEL = "reference"
logger = logging.getLogger(__name__)


class Run:
    """A training run on this rank; building it loads or makes everything that `train` needs."""

    def __init__(self, config: Config):
        self.started_s = time.monotonic()
        self.config = config
        self.device = training_device()
        self.rank, self.world_size = own_rank(), num_ranks()
        self.folder = Path(config.train.resume or config.train.output_dir)
        self.resumed_from: Path | None = None
        self.first_step = 0
        found = sound_checkpoint(self.folder) if config.train.resume else None
        if not config.train.resume and ((self.folder / "metrics.jsonl").exists() or checkpoints(self.folder)):
            raise ValueError(
                f"output_dir={str(self.folder)!r} holds a run; continue it with --resume or choose another"
            )
        record = config.rollout.record_rollouts
        if record and not config.train.resume and Path(record).exists():
            raise ValueError(f"record_rollouts={record!r} exists; only a resumed run adds to a record: choose another")
        barrier()
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

        self.train_samples, self.eval_samples = self._load_samples()
        phases = parse_phases(config.train.phases)
        self.phases = in_steps(phases, config.train, len(self.train_samples), self.world_size)
        if found:
            self.resumed_from, state = found
            self.first_step = state["step"]
            check_same_run(self.folder, state, config, self.train_samples, self.world_size)
        elif config.train.resume:
            logger.warning("%s: stopped before its first checkpoint; starting from its beginning", self.folder)
        dtype = resolve_dtype(config.model.dtype, self.device)
        check_attention_core(config.model.attention_core, dtype, self.device)
        checkpoint = str(self.resumed_from / MODEL) if self.resumed_from else self._initial_checkpoint()
        with partitioned_loading(config, dtype):
            model, self.chat = load_model(checkpoint, config.model, dtype)
            model = self._with_adapters(model, checkpoint)
        data = config.data
        self.policy = Policy(
            model,
            gradient_checkpointing=config.model.gradient_checkpointing,
            checkpoint_every=config.model.checkpoint_every,
            checkpoint_vision=config.model.checkpoint_vision,
            attention_core=config.model.attention_core,
        )
        if config.model.freeze_vision:
            self.policy.base_model.model.visual.requires_grad_(False)
        if data.cache_features and not self.policy.has_frozen_tower:
            raise ValueError("cache_features=True: the vision tower is trained, so its features change; freeze_vision")
        if data.cache_features and is_partitioned(self.policy):
            raise ValueError("cache_features=True: partitioned ranks encode videos in step; choose zero_stage 2")
        self.loader = PromptLoader(
            self.chat,
            geometry_of(model.config, data.min_pixels, data.max_pixels, data.total_pixels),
            data,
            tower=tower_fingerprint(self.policy.base_model) if data.cache_features else "",
        )
        if self.resumed_from:
            saved, allow_pickle = self.resumed_from / ENGINE, config.model.allow_pickle
            with loadable_state(saved, self.folder / "universal", allow_pickle) as (folder, is_universal):
                self.engine = build_engine(self.policy, config, dtype, load_universal=is_universal)
                load_engine(self.engine, folder, allow_pickle, not config.model.lora_rank)
        else:
            self.engine = build_engine(self.policy, config, dtype)
        self.backend = self._build_backend(checkpoint, dtype)
        self.reference: Forward | None = None
        self.watch = Stopwatch()
        train = config.train
        self.heartbeat = Heartbeat(self.folder, self.rank, self.world_size, train.stall_timeout_s)
        self.graceful_stop = GracefulStop(train.stop_grace_s)
        self.skipped_steps = SkippedSteps(self.folder, self.rank, train.max_skipped_steps)
        if self.rank == 0 and config.train.resume and config.rollout.record_rollouts:
            drop_rows_from(Path(config.rollout.record_rollouts), self.first_step)
        self.record = self._recorded(config.rollout.record_rollouts)
        self.replay = self._recorded(config.rollout.replay_rollouts)

    def _load_samples(self) -> tuple[list[Sample], list[Sample]]:
        data = self.config.data
        if data.annotations == "synthetic":
            train, val, test = data.num_synthetic_videos()
            config = SyntheticConfig(num_train=train, num_val=val, num_test=test)
            folder = made_by_first_rank(lambda: _generate_videos(Path(data.synthetic_dir), config))
            data = dataclasses.replace(
                data,
                annotations=str(folder / "annotations/train.json"),
                eval_annotations=str(folder / "annotations/test.json"),
                videos=str(folder / "videos"),
            )
        return load_training_data(data)

    def _build_backend(self, checkpoint: str, dtype: torch.dtype) -> RolloutBackend:
        rollout, train = self.config.rollout, self.config.train
        if rollout.rollout_backend == "vllm":
            from tempsamp_fast.rollout.vllm import VllmBackend, colocated_llm

            room = self.policy.config.text_config.max_position_embeddings
            max_tokens = min(room, train.max_tokens_per_row + rollout.max_completion_length)
            llm = colocated_llm(checkpoint, dtype, max_tokens, rollout.vllm_memory, train.seed)
            return VllmBackend(self.engine, self.chat, self.config.data.task, llm)
        return PolicyBackend(
            self.engine,
            [self.chat.eos_token_id],
            self.chat.banned_token_ids,
            train.max_tokens_per_row,
            rollout.cuda_graphs,
        )

    def _initial_checkpoint(self) -> str:
        if self.config.model.model != "tiny":
            return self.config.model.model
        mode_texts = [
            text
            for sample in self.train_samples
            for mode in ("answer", "think")
            for text in (question(sample.query, mode, self.config.data.task), off_policy_text(sample, mode) or "")
        ]
        folder = self.folder / "tiny_model"
        family, seed = self.config.model.tiny_family, self.config.train.seed
        return str(made_by_first_rank(lambda: build_tiny_checkpoint(folder, mode_texts, family, seed)))

    def _recorded(self, path: str | None) -> RecordedRollouts | None:
        return RecordedRollouts(path, self.chat) if path else None

    def log(self) -> RunLog:
        """The record of this run; open it around the loop."""
        total = sum(phase.num_steps for phase in self.phases)
        return RunLog(self.folder, self.config, total, self.first_step, active=self.rank == 0)

    def steps(self) -> Prefetch[tuple[PhaseStep, list[Prompt]]]:
        """The remaining steps with this rank's prompts, videos decoded ahead in a thread; a context manager."""
        remaining = plan(self.phases, self.first_step)
        return Prefetch(((at, self.prompts(at)) for at in remaining), depth=self.config.data.prefetch_steps)

    def prompts(self, at: PhaseStep) -> list[Prompt]:
        """This rank's prompts of a step. The step's prompts are the same whatever the number of ranks."""
        per_rank = prompts_per_step(self.config.train, at.phase, world_size=1)
        first = self._prompts_before(at) + per_rank * self.rank
        positions = range(first, first + per_rank)
        modes = [at.phase.modes[position % len(at.phase.modes)] for position in positions]
        return self.loader.training_prompts(self.train_samples, positions, modes, self.config.train.seed)

    def _prompts_before(self, at: PhaseStep) -> int:
        earlier = [(phase, phase.num_steps) for phase in self.phases[: at.phase_index]]
        done = [*earlier, (at.phase, at.step_in_phase)]
        return sum(steps * prompts_per_step(self.config.train, phase, self.world_size) for phase, steps in done)

    def answer(self, at: PhaseStep, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Scored groups for the prompts, sampled or replayed."""

        def sampler(asked: Sequence[Prompt], num_completions: Sequence[int]) -> list[list[Completion]]:
            self.heartbeat.at(f"rollout of step {at.step}")
            if self.replay:
                answers = self.replay.read(at.step, asked, num_completions)
            else:
                answers = self.sample(asked, num_completions, self.config.rollout.temperature, step=at.step)
            if self.record:
                self.record.write(at.step, asked, answers)
            self.watch.lap("rollout")
            return answers

        config = self.config
        groups = answer(
            self.with_features(prompts),
            at.phase.method,
            config.rollout.num_generations,
            sampler,
            self.chat,
            config.algorithm,
            config.data.task,
        )
        self.watch.lap("reward")
        return groups

    def with_features(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts with the features of their videos where the tower is frozen, else as they are."""
        if not self.policy.has_frozen_tower:
            return prompts
        prompts = with_vision_features(self.engine, prompts)
        self.loader.keep_features(prompts)
        self.watch.lap("vision")
        return prompts

    def sample(
        self, prompts: Sequence[Prompt], num_completions: int | Sequence[int], temperature: float, step: int = 0
    ) -> list[list[Completion]]:
        """Answers of the current policy, as many for all prompts or for each; `temperature` 0 is greedy."""
        rollout = self.config.rollout
        params = SamplingParams(
            temperature=temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_completion_length=rollout.max_completion_length,
        )
        self.backend.sync_weights()
        answers = self.backend.generate(prompts, num_completions, params, seed=(self.config.train.seed, step))
        return [[self.chat.completion(each.ids, each.logps) for each in group] for group in answers]

    def greedy(self, prompts: Sequence[Prompt], num_completions: Sequence[int]) -> list[list[Completion]]:
        """The sampler of evaluation."""
        self.heartbeat.at("evaluation")
        return self.sample(self.with_features(prompts), num_completions, temperature=0.0)

    def update(self, at: PhaseStep, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """One optimizer step on scored groups with advantages."""
        if at.phase.method != "sft" and self.config.algorithm.beta > 0 and self.reference is None:
            self.reference = self._build_reference(is_first=at.step == self._first_reinforcement_step())
            self.watch.lap("reference")
        rate = learning_rate(self.config.train, at.phase, at.step_in_phase)
        self.heartbeat.at(f"update of step {at.step}")
        metrics = update(
            self.engine,
            self.reference,
            groups,
            at.phase.method,
            self.config,
            prompts_per_row(self.config.train, at.phase),
            rate,
            self.watch,
        )
        self.skipped_steps.note(at, groups, metrics)
        self.heartbeat.at(f"records of step {at.step} and data of the next")
        return metrics

    def _first_reinforcement_step(self) -> int | None:
        return next((at.step for at in plan(self.phases) if at.phase.method != "sft"), None)

    def _with_adapters(self, model: Any, checkpoint: str) -> Any:
        """The model with what `lora_rank` asks for. Raises ValueError where a checkpoint's adapters are not that.

        Adapters that learned something before reinforcement are not switched off for its reference but kept.
        """
        rank, found = self.config.model.lora_rank, base_checkpoint(checkpoint)
        has = model.peft_config[TRAINED].r if found else rank
        if has != rank:
            raise ValueError(f"lora_rank={rank}: the adapters in {checkpoint} have rank {has}; ask for that")
        if rank == 0:
            return model
        if not found:
            model = add_adapters(model, self.config.model, self.config.train.seed)
        first = self._first_reinforcement_step()
        learned_before = first is not None and (first > 0 or (found is not None and self.resumed_from is None))
        if self.config.algorithm.beta > 0 and learned_before and REFERENCE not in model.peft_config:
            if first is not None and self.first_step > first:
                raise ValueError("beta: this run's reinforcement began without a reference; resume it with --beta 0")
            add_reference(model)
        return model

    def _build_reference(self, is_first: bool) -> Forward:
        """The policy as it was before its first reinforcement step, frozen; kept in RUN/reference for resuming."""
        if self.config.model.lora_rank:
            if is_first:
                remember_reference(self.policy.model)
            return adapter_reference(self.engine)
        folder = self.folder / REFERENCE_MODEL
        if is_first:
            save_reference(folder, self.policy, self.chat, self.config.data)
        else:
            check_reference(folder)
        dtype = self.policy.base_model.dtype
        with partitioned_loading(self.config, dtype):
            model, _ = load_model(str(folder), self.config.model, dtype)
        policy = Policy(model, attention_core=self.config.model.attention_core)
        return frozen_reference(policy, self.config, dtype, self.device)

    def is_save_step(self, at: PhaseStep) -> bool:
        """Whether `save_steps` asks for a checkpoint after this step."""
        every = self.config.train.save_steps
        return every > 0 and (at.step + 1) % every == 0

    def save(self, num_steps: int) -> None:
        """Checkpoint after `num_steps` optimizer steps."""
        self.heartbeat.at(f"checkpoint after {num_steps} steps")
        facts = facts_of(self.config, self.train_samples, self.world_size)
        save_checkpoint(self.folder, num_steps, self.engine, self.policy, self.chat, self.config, facts)


def _generate_videos(folder: Path, config: SyntheticConfig) -> Path:
    with tqdm(desc="making videos", unit="video", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return generate_videos(folder, config, on_progress=show)

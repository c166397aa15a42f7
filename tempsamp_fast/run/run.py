"""What a rank owns of a training run, in the order of a step: videos, model, engine, sampler, learner, records."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tempsamp_fast.batch import Completion, Prompt, RolloutGroup
from tempsamp_fast.config import Config, parse_phases, prompts_per_row, prompts_per_step
from tempsamp_fast.data.catalogue import load_training_data, require_clip_scores
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.data.prefetch import Prefetch
from tempsamp_fast.data.prompt_file import read_prompt_file
from tempsamp_fast.embedded.data import embedded_checkpoint, with_embedded_data
from tempsamp_fast.learning.balance import balance_prompts
from tempsamp_fast.learning.engine import build_engine, learning_rate
from tempsamp_fast.learning.groups import RecordedRollouts, answer
from tempsamp_fast.learning.own_rewards import reward_function, reward_terms, try_rewards
from tempsamp_fast.learning.partitioned import Forward, partitioned_loading
from tempsamp_fast.learning.universal import restored_engine
from tempsamp_fast.learning.update import update
from tempsamp_fast.learning.vision_features import features_key, with_pixels_on, with_vision_features
from tempsamp_fast.model.attention import check_attention_core
from tempsamp_fast.model.families import family_named, geometry_of
from tempsamp_fast.model.loading import load_model, resolve_dtype
from tempsamp_fast.model.lora import REFERENCE, add_reference, with_adapters
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.sequence_parallel import check_sequence_parallel, sequence_group
from tempsamp_fast.planning.look import look_at_prompts, look_for_all_videos
from tempsamp_fast.rollout.backends import build_backend
from tempsamp_fast.rollout.generate import SamplingParams
from tempsamp_fast.run.checkpoint import ENGINE, save_checkpoint
from tempsamp_fast.run.log import RunLog, drop_rows_from
from tempsamp_fast.run.reference import reference_of
from tempsamp_fast.run.resume import check_same_run, facts_of, open_folder
from tempsamp_fast.run.saving import Saving
from tempsamp_fast.run.schedule import PhaseStep, first_reinforcement_step, in_steps, plan
from tempsamp_fast.run.skipped_steps import SkippedSteps
from tempsamp_fast.system.device import decoding_threads, training_device
from tempsamp_fast.system.heartbeat import GracefulStop, Heartbeat
from tempsamp_fast.system.ranks import max_over_ranks, num_ranks, own_rank
from tempsamp_fast.system.stopwatch import Stopwatch

logger = logging.getLogger(__name__)


class Run:
    """A training run on this rank; building it loads or makes everything that `train` needs."""

    def __init__(self, config: Config):
        self.started_s = time.monotonic()
        self.config, data, train = config, config.data, config.train
        self.device, self.rank, self.world_size = training_device(), own_rank(), num_ranks()
        family_named(config.model.tiny_family, "tiny_family")
        for term in reward_terms(config.algorithm, data.task):
            reward_function(term)  # what is wrong with it is told before anything is made
        templates = read_prompt_file(data.prompt_file) if data.prompt_file else None
        start = open_folder(train, config.rollout)
        self.folder, self.resumed_from, self.first_step = start.path, start.resumed_from, start.first_step
        made = with_embedded_data(data)
        self.train_samples, self.eval_samples = load_training_data(made)
        self.order = TrainingOrder(self.train_samples, train.seed, train.queries_per_video)
        if any(term.name == "highlight" for term in reward_terms(config.algorithm, data.task)):
            require_clip_scores(made.annotations, self.train_samples, "--rewards highlight")
        try_rewards(config.algorithm, data.task, self.train_samples)
        look_for_all_videos(made, self.train_samples, self.eval_samples)
        self.phases = in_steps(parse_phases(train.phases), train, len(self.train_samples), self.world_size)
        if start.state:
            logger.info("resuming %s after step %d, at step %d", self.folder, self.first_step - 1, self.first_step)
            check_same_run(self.folder, start.state, config, self.train_samples, self.world_size)

        dtype = resolve_dtype(config.model.dtype, self.device)
        check_attention_core(config.model.attention_core, dtype, self.device)
        checkpoint = start.model or self._initial_checkpoint()
        self.policy, self.chat = self._load_policy(checkpoint, dtype)
        self.chat.answer_form = data.answer_form
        self.chat.templates = templates
        modes: list[Any] = [mode for phase in self.phases for mode in phase.modes]
        modes += train.eval_modes.split("+") if self.eval_samples else []
        if templates:
            self.chat.check_templates({*modes}, f"--prompt_file {data.prompt_file}")
        self.chat.check({*modes})
        self.loader = PromptLoader(
            self.chat,
            geometry_of(self.policy.config, data.min_pixels, data.max_pixels, data.total_pixels),
            data,
            max_prompt_tokens=train.max_tokens_per_row,
            tower=features_key(self.policy, data.cache_features),
            num_threads=decoding_threads(),
        )
        look_at_prompts(
            [*self.train_samples, *self.eval_samples],
            data,
            self.policy.config,
            train.max_tokens_per_row,
            lambda sample: max(len(self.chat.unexpanded(sample, mode, data.task)) for mode in modes),
            modes,
        )
        check_sequence_parallel(train.sequence_parallel_size, self.policy.config)
        self.sequence_group = sequence_group(train.sequence_parallel_size)
        if self.resumed_from:
            self.engine = restored_engine(self.policy, train, config.model, dtype, self.resumed_from / ENGINE)
        else:
            self.engine = build_engine(self.policy, train, dtype)
        self.backend = build_backend(self.engine, self.chat, config.rollout, train, data.task)
        self.reference: Forward | None = None
        self.record, self.replay = self._recorded(config.rollout.record_rollouts, config.rollout.replay_rollouts)

        self.watch = Stopwatch()
        self.saving = Saving(self.device)
        self._facts = facts_of(config, self.train_samples, self.world_size)
        given = self.folder, self.rank, self.world_size, train.stall_timeout_s
        self.heartbeat = Heartbeat(*given, self.saving.finish_alone)
        go_on = f"go on with --resume {self.folder}"
        self.graceful_stop = GracefulStop(train.stop_grace_s, go_on, self.saving.finish_alone)
        num_steps = sum(phase.num_steps for phase in self.phases)
        self.skipped_steps = SkippedSteps(self.folder, self.rank, train.max_skipped_steps, num_steps)
        self._saved_s = time.monotonic()

    def _initial_checkpoint(self) -> str:
        model, data = self.config.model, self.config.data
        if model.model != "tiny":
            return model.model
        folder, seed = self.folder / "tiny_model", self.config.train.seed
        return embedded_checkpoint(folder, self.train_samples, data.task, model.tiny_family, seed, data.answer_form)

    def _load_policy(self, checkpoint: str, dtype: torch.dtype) -> tuple[Policy, Chat]:
        """Adapters that learned something before reinforcement are not switched off for its reference but kept."""
        settings, train = self.config.model, self.config.train
        with partitioned_loading(train, dtype):
            model, chat = load_model(checkpoint, settings, dtype)
            model, was_found = with_adapters(model, checkpoint, settings, train.seed)
        first = first_reinforcement_step(self.phases)
        if settings.lora_rank and self.config.algorithm.beta > 0 and first is not None:
            learned_before = first > 0 or (was_found and self.resumed_from is None)
            if learned_before and REFERENCE not in model.peft_config:
                if self.first_step > first:
                    raise ValueError(
                        "beta: this run's reinforcement began without a reference; resume it with --beta 0"
                    )
                add_reference(model)
        policy = Policy(
            model,
            gradient_checkpointing=settings.gradient_checkpointing,
            checkpoint_every=settings.checkpoint_every,
            checkpoint_vision=settings.checkpoint_vision,
            attention_core=settings.attention_core,
        )
        if settings.freeze_vision:
            policy.base_model.model.visual.requires_grad_(False)
        return policy, chat

    def _recorded(self, *paths: str | None) -> list[RecordedRollouts | None]:
        written = paths[0]
        if written and self.rank == 0 and self.config.train.resume:
            drop_rows_from(Path(written), self.first_step)
        return [RecordedRollouts(path, self.chat) if path else None for path in paths]

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
        return self.loader.training_prompts(self.order, positions, modes)

    def _prompts_before(self, at: PhaseStep) -> int:
        earlier = [(phase, phase.num_steps) for phase in self.phases[: at.phase_index]]
        done = [*earlier, (at.phase, at.step_in_phase)]
        return sum(steps * prompts_per_step(self.config.train, phase, self.world_size) for phase, steps in done)

    def epochs(self, at: PhaseStep) -> dict[str, float]:
        """`data/epoch`: how often each training sample has been asked once the step is done."""
        asked = self._prompts_before(at) + prompts_per_step(self.config.train, at.phase, self.world_size)
        return {"data/epoch": asked / len(self.train_samples)}

    def answer(self, at: PhaseStep, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Scored groups for this rank's share of all ranks' prompts, sampled or replayed."""

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

        config, method = self.config, at.phase.method
        shared_out = balance_prompts(prompts, self.policy.config, self.device)
        asked = with_pixels_on(self.device, self.with_features(shared_out))
        rollout, task = config.rollout, config.data.task
        longest = rollout.max_completion_length
        groups = answer(asked, method, rollout.num_generations, sampler, self.chat, config.algorithm, task, longest)
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
        params = SamplingParams(temperature, rollout.top_p, rollout.top_k, rollout.max_completion_length)
        self.backend.sync_weights()
        answers = self.backend.generate(prompts, num_completions, params, seed=(self.config.train.seed, step))
        return [
            [self.chat.completion(each.ids, each.logps, prompt.opening) for each in group]
            for prompt, group in zip(prompts, answers, strict=True)
        ]

    def greedy(self, prompts: Sequence[Prompt], num_completions: Sequence[int]) -> list[list[Completion]]:
        """The sampler of evaluation."""
        self.heartbeat.at("evaluation")
        return self.sample(self.with_features(prompts), num_completions, temperature=0.0)

    def update(self, at: PhaseStep, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """One optimizer step on scored groups with advantages."""
        config = self.config
        if at.phase.method != "sft" and config.algorithm.beta > 0 and self.reference is None:
            self.reference = self._build_reference(is_first=at.step == first_reinforcement_step(self.phases))
            self.watch.lap("reference")
        self.heartbeat.at(f"update of step {at.step}")
        per_row, rate = prompts_per_row(config.train, at.phase), learning_rate(config.train, at.phase, at.step_in_phase)
        method = at.phase.method
        given = config, per_row, rate, self.watch, self.sequence_group
        metrics = update(self.engine, self.reference, groups, method, *given)
        self.skipped_steps.note(at, groups, metrics)
        self.heartbeat.at(f"records of step {at.step} and data of the next")
        return metrics

    def _build_reference(self, is_first: bool) -> Forward:
        config = self.config
        return reference_of(self.folder, self.engine, self.chat, config.model, config.data, config.train, is_first)

    def is_stopping(self) -> bool:
        """Whether any rank was asked to stop; every rank asks at the same places."""
        return self.graceful_stop.agreed(self.device)

    def say_stopped(self, when: str) -> None:
        """Once, whatever the number of ranks."""
        if self.rank == 0:
            logger.warning("stopped %s as asked; go on with --resume %s", when, self.folder)

    def is_save_step(self, at: PhaseStep) -> bool:
        """Whether `save_steps`, or `save_minutes` by the clock of rank 0, ask for a checkpoint after this step."""
        every, minutes = self.config.train.save_steps, self.config.train.save_minutes
        is_late = self.rank == 0 and time.monotonic() - self._saved_s >= 60 * minutes
        is_due = minutes > 0 and bool(max_over_ranks(int(is_late), self.device))
        return is_due or (every > 0 and (at.step + 1) % every == 0)

    def is_eval_step(self, at: PhaseStep) -> bool:
        """Whether `eval_steps` asks for an evaluation after this step."""
        every = self.config.train.eval_steps
        return every > 0 and (at.step + 1) % every == 0

    def save(self, num_steps: int) -> bool:
        """Checkpoint after `num_steps` optimizer steps, as `Saving` does; none, and False, where all were skipped."""
        self._saved_s = time.monotonic()
        if self.skipped_steps.is_in_vain and self.first_step == 0:
            logger.warning("no checkpoint: the loss or gradient of all %d steps so far was not finite", num_steps)
            return False
        self.heartbeat.at(f"checkpoint after {num_steps} steps")
        given = self.engine, self.policy, self.chat, self.config, self._facts
        with self.graceful_stop.patience():
            self.saving.begin(lambda: save_checkpoint(self.folder, num_steps, *given))
        return True

"""Train a video language model to find when something happens: `deepspeed tempsamp_fast/train.py [--flag value]`."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.system.device import join_ranks, prepare_environment, training_device

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while importing there is nothing to tell
prepare_environment()

import deepspeed  # noqa: E402
import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from tempsamp_fast.arguments import describe_settings, parse_args  # noqa: E402
from tempsamp_fast.learning.advantage import advantage_metrics, assign_advantages  # noqa: E402
from tempsamp_fast.learning.groups import reward_metrics  # noqa: E402
from tempsamp_fast.learning.metrics import mean_over_ranks  # noqa: E402
from tempsamp_fast.plan import decided, describe_plan, look_before  # noqa: E402
from tempsamp_fast.run.results import Results  # noqa: E402
from tempsamp_fast.run.run import Run  # noqa: E402
from tempsamp_fast.system.files import escaped, log_printably, one_line, write_file  # noqa: E402
from tempsamp_fast.system.heartbeat import LOST_RANK_EXIT, RankLostError  # noqa: E402
from tempsamp_fast.system.ranks import of_all_ranks  # noqa: E402

OUT_OF_MEMORY = (
    "; lower max_tokens_per_row, for rollouts prompts_per_device, num_generations or max_completion_length, for "
    "evaluations eval_batch_size"
)
logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """The whole job: sample, score, advantage, update, and an evaluation and a checkpoint after each phase."""
    algorithm, results = run.config.algorithm, Results(run)
    with run.log() as log, run.heartbeat, run.graceful_stop, run.saving, run.steps() as steps:
        results.make_up(log)
        if run.is_stopping():
            return run.say_stopped(f"before step {run.first_step}")
        run.watch.restart()
        for at, prompts in steps:
            run.watch.lap("data")
            groups = run.answer(at, prompts)
            assign_advantages(groups, at.phase.method, algorithm)
            metrics = run.update(at, groups)

            metrics |= reward_metrics(groups, algorithm.rewards) | run.epochs(at) | run.watch.total()
            if at.phase.method == "tempsamp":
                metrics |= advantage_metrics(groups, algorithm)
            means = mean_over_ranks(metrics, len(groups))
            num_bad_videos = sum(of_all_ranks(sum(prompt.is_replacement for prompt in prompts)))
            log.log(at.step, str(at.phase), means | {"data/bad_videos": num_bad_videos})
            log.log_groups(at.step, str(at.phase), groups)

            is_better = False
            if at.is_last_of_phase:
                is_better = results.evaluate(f"{at.phase_index + 1}_{at.phase}", at.step + 1, log)
            elif run.is_eval_step(at):
                is_better = results.evaluate(f"step {at.step + 1}", at.step + 1, log)
            is_stopping = run.is_stopping()
            is_best = is_better and run.config.train.keep_best
            is_due = run.is_save_step(at) or run.saving.has_lost_one()
            if at.is_last_of_phase or is_due or is_stopping or is_best:
                run.save(at.step + 1)
            if is_stopping:
                run.saving.finish()
                return run.say_stopped(f"after step {at.step}")
            run.watch.restart()
    results.finish()


def main(arguments: Sequence[str]) -> None:
    """Parse, build, train; user errors end with one line on stderr and exit code 2, the traceback in RUN/error.log."""
    log_printably()
    logging.basicConfig(level=logging.INFO if os.environ["RANK"] == "0" else logging.WARNING, format="%(message)s")
    disable_progress_bar()
    folder = None
    try:
        world_size, is_first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
        config = decided(parse_args(arguments), world_size)
        if is_first:
            logger.info("%s", describe_settings(arguments, config))
        if "ACCELERATE_USE_CPU" in os.environ and world_size == 1:
            logger.warning(
                "started by accelerate as one process, on a CPU whatever its --num_processes: torchrun starts several"
            )
        if config.train.dry_run:
            if is_first:
                print(escaped(describe_plan(config, world_size)))
                look_before(config)
            return
        folder = Path(config.train.resume or config.train.output_dir)
        training_device()
        join_ranks(deepspeed.accelerator.get_accelerator().communication_backend_name())
        deepspeed.init_distributed(verbose=False)
        train(Run(config))
    except (ValueError, OSError, FloatingPointError, RankLostError, torch.OutOfMemoryError) as error:
        if folder and folder.is_dir():
            with contextlib.suppress(OSError):  # the disk may be what is full
                write_file(folder / "error.log", traceback.format_exc())
        advice = OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ""
        sys.stderr.write(f"error: {one_line(error)}{advice}\n")
        sys.exit(LOST_RANK_EXIT if isinstance(error, RankLostError) else 2)
    except KeyboardInterrupt:
        go_on = f"; go on with --resume {folder}" if folder and (folder / "config.json").exists() else ""
        sys.stderr.write(f"error: Ctrl-C{go_on}\n")
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(sys.argv[1:])

"""What the trainer's tests share: encoded clips, a small checkpoint, a finished run, and ways to start more."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.data import loader
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.prompts import off_policy_text, question
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.embedded.videos import SyntheticConfig, generate
from tempsamp_fast.learning.advantage import assign_advantages
from tempsamp_fast.report import plots
from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import PhaseStep, plan
from tempsamp_fast.system.device import free_port, join_ranks, prepare_environment

REPOSITORY = Path(__file__).parents[1]
PLOT_RUN = plots.plot_run
RECIPE = """
dtype: float32
video_backend: torchcodec
fps: 1
min_pixels: 3136
max_pixels: 3136
max_eval_samples: 0
num_generations: 3
max_completion_length: 12
prompts_per_device: 1
gradient_accumulation_steps: 2
learning_rate: 2.0e-4
warmup_ratio: 0
beta: 0
"""


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos/` and `annotations/{train,test}.json` of a few short embedded clips."""
    config = SyntheticConfig(
        num_train=6, num_val=0, num_test=2, min_duration_s=8.0, max_duration_s=10.0, sizes=("64x48", "48x64")
    )
    return generate(tmp_path_factory.mktemp("clips"), config)


@pytest.fixture(scope="session")
def checkpoint(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded Qwen2.5-VL with random weights, as a folder."""
    samples = load_annotations(clips / "annotations/train.json", clips / "videos")
    texts = [
        text
        for sample in samples
        for mode in ("answer", "think")
        for text in (question(sample.query, mode), off_policy_text(sample, mode) or "")
    ]
    return build_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), texts)


class RankServer:
    """Runs of several ranks by `rank_server.py`, which is started when the first is asked for."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, log: Path, num_ranks: int, words: list[str], main: str | None = None) -> None:
        """Run the trainer, or the function `module:name`, on `num_ranks` ranks; what they print is in `log`."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        log.mkdir(exist_ok=True)
        request = {"log": str(log), "num_ranks": num_ranks, "port": free_port(), "words": words, "main": main}
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        codes = json.loads(self._server.stdout.readline())
        assert codes == [0] * num_ranks, "\n".join(path.read_text() for path in sorted(log.iterdir()))

    def close(self) -> None:
        if self._server is not None and self._server.stdin is not None:
            self._server.stdin.close()
            self._server.wait()


@dataclass(frozen=True)
class Trainer:
    """Starts small runs on the shared clips; every method takes further command line words."""

    clips: Path
    checkpoint: Path
    recipe: Path
    rank_server: RankServer

    def flags(self, output_dir: Path, *words: str) -> list[str]:
        return [
            *("--config", str(self.recipe), "--model", str(self.checkpoint), "--output_dir", str(output_dir)),
            *("--annotations", str(self.clips / "annotations/train.json"), "--videos", str(self.clips / "videos")),
            *words,
        ]

    def main(self, output_dir: Path, *words: str) -> list[dict[str, Any]]:
        """A whole run in this process; returns the rows of its metrics.jsonl."""
        from tempsamp_fast.train import main  # loads DeepSpeed, which most tests do without

        main(self.flags(output_dir, *words))
        return read_metrics(output_dir)

    def cut_and_resumed(self, output_dir: Path, step: int, *words: str) -> list[dict[str, Any]]:
        """As `main`, but resumed from the checkpoint after `step`, as if no later one had been completed."""
        self.main(output_dir, *words)
        for folder in (output_dir / "checkpoints").glob("step_*"):
            if folder.name != f"step_{step:06d}":
                (folder / "state.json").unlink()
        return self.main(output_dir, *words, "--resume", str(output_dir))

    def ranks(self, output_dir: Path, num_ranks: int, *words: str) -> list[dict[str, Any]]:
        """A whole run on several ranks, without the launcher; returns the rows of its metrics.jsonl."""
        self.rank_server.run(output_dir.with_suffix(".logs"), num_ranks, self.flags(output_dir, *words))
        return read_metrics(output_dir)

    def run(self, output_dir: Path, *words: str) -> Run:
        """A run that is built but not started."""
        return Run(parse_args(self.flags(output_dir, *words)))

    def launch(self, output_dir: Path, num_ranks: int, *words: str) -> list[dict[str, Any]]:
        """A whole run by the `deepspeed` launcher on the CPU; returns the rows of its metrics.jsonl."""
        set_by_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
        environment = {name: value for name, value in os.environ.items() if name not in set_by_launcher}
        command = [
            *(str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(num_ranks)),
            *("--master_port", str(free_port()), str(REPOSITORY / "tempsamp_fast/train.py")),
            *self.flags(output_dir, *words),
        ]
        done = subprocess.run(
            command,
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return read_metrics(output_dir)


@pytest.fixture(scope="session")
def rank_server() -> Iterator[RankServer]:
    server = RankServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def trainer(
    clips: Path,
    checkpoint: Path,
    process_group: None,
    rank_server: RankServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Trainer]:
    recipe = tmp_path_factory.mktemp("recipe") / "small.yaml"
    recipe.write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_run", lambda _: [])  # it takes longer than most of the runs
        yield Trainer(clips, checkpoint, recipe, rank_server)


@pytest.fixture
def pictures(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their pictures."""
    monkeypatch.setattr(plots, "plot_run", PLOT_RUN)


@dataclass(frozen=True)
class Stepper:
    """Takes steps of a run without its evaluations and records."""

    run: Run

    def groups(self, at: PhaseStep) -> list[RolloutGroup]:
        groups = self.run.answer(at, self.run.prompts(at))
        assign_advantages(groups, at.phase.method, self.run.config.algorithm)
        return groups

    def steps(self) -> list[dict[str, float]]:
        """The metrics of every step of the plan."""
        return [self.run.update(at, self.groups(at)) for at in plan(self.run.phases)]

    def weights(self) -> torch.Tensor:
        """[num_parameters] float32, whole where ZeRO-3 has parted them."""
        import deepspeed

        parameters = list(self.run.policy.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            return torch.cat([parameter.detach().flatten().clone() for parameter in parameters])


@pytest.fixture
def stepper(trainer: Trainer, tmp_path: Path) -> Callable[..., Stepper]:
    """`stepper(*words)`: a new run, ready to take steps."""
    number = itertools.count()
    return lambda *words: Stepper(trainer.run(tmp_path / f"run{next(number)}", *words))


FINISHED = ("--phases", "sft:2,tempsamp:3", "--save_steps", "1", "--keep_checkpoints", "2", "--beta", "0.04")
FINISHED_EVALUATION = ("--max_eval_samples", "4", "--eval_batch_size", "4")


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    words: tuple[str, ...]
    rows: list[dict[str, Any]]


@pytest.fixture(scope="session")
def finished_run(trainer: Trainer, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Two phases, an evaluation after each, a checkpoint after every step, and pictures of it all."""
    words = (*FINISHED, *FINISHED_EVALUATION, "--eval_annotations", str(clips / "annotations/test.json"))
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "plot_run", PLOT_RUN)
        return FinishedRun(folder, words, trainer.main(folder, *words))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """`refused(words)`: the one line on stderr with which the trainer ends, exit code 2."""

    def run(words: list[str]) -> str:
        from tempsamp_fast.train import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(words)
        assert exit_.value.code == 2
        line = re.search(r"^error: (.+)\n\Z", capsys.readouterr().err, re.MULTILINE)
        assert line is not None
        return line[1]

    return run


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """What the trainer makes once per process; workers of pytest-xdist inherit a port that they must not share."""
    prepare_environment()
    import deepspeed

    os.environ["MASTER_PORT"] = str(free_port())
    join_ranks("gloo")
    deepspeed.init_distributed(verbose=False)
    yield


@pytest.fixture
def without_times() -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """What must be the same when a run is repeated."""
    return _without_times


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))} for row in rows]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is decoded, as often as it is."""
    paths: list[Path] = []
    load_videos = loader.load_videos

    def counting(requests, *arguments, **options):
        paths.extend(path for path, _ in requests)
        return load_videos(requests, *arguments, **options)

    monkeypatch.setattr(loader, "load_videos", counting)
    return paths

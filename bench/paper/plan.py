"""The runs of the campaign: what is made, asked and trained, with settings that are the same for all methods.

The learning rate is chosen by the campaign itself, on a seed of its own: the one of `PILOT_RATES` at which the methods
do best on average.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tempsamp_fast.demo.pretrain import EASY, HARD

DATA = {"easy": EASY, "hard": HARD}
FAR = dataclasses.replace(
    HARD, num_train=0, num_test=300, min_duration_s=14.0, max_duration_s=18.0, shapes=("square", "triangle")
)
"""Longer videos of other shapes, which nothing is trained on: out of domain."""

PROMPTS_PER_STEP = 16
RECIPE = "tiny_cpu"
"""What the settings below are laid over, named in every run: own annotations would otherwise take another recipe."""
COMMON: dict[str, object] = {
    "random_crop": 0,
    "min_pixels": 784,
    "max_pixels": 784,
    "freeze_vision": True,
    "prompts_per_device": PROMPTS_PER_STEP,
    "warmup_ratio": 0.1,
    "lr_schedule": "constant",
    "max_completion_length": 24,
    "eval_modes": "answer",
    "eval_batch_size": 256,
}
BASE: dict[str, object] = {
    "phases": "sft:1500@1e-3,sft/answer+think:100@3e-4",
    "lr_schedule": "cosine",
    "max_completion_length": 64,
    "seed": 9000,
}
"""The base model, one for all seeds as a published checkpoint would be: it looks at easy videos, and has seen how
thoughts are written."""
COLD_START: dict[str, object] = {"phases": "sft:30@3e-4", "lr_schedule": "cosine"}
"""From the base model to a seed's cold start, on the hard videos: short, so that few sampled answers hit."""
STARTS = {"cold": COLD_START, "rare": {**COLD_START, "phases": "sft:8@3e-4"}}
"""From the base model to where a run begins; after fewer steps still fewer sampled answers hit."""
COLD_START_SEED = 1000
"""Added to a run's seed: the cold start takes the training samples in an order of its own."""

STAGES = (30, 30, 30, 30)
STAGE_SHARES = (1.0, 1.0, 1.0, 0.3)
"""Training is cut into stages of so many steps, each at its share of the learning rate, an evaluation after each."""
PILOT_RATES = (1e-4, 3e-4, 6e-4)
PILOT_SEED = 100

CORE_GROUP_SIZE = 4
METHODS = ("sft", "grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl")
SEEDS = range(8)
EXPLORATORY_SEEDS = range(3)
GROUP_SIZES = (2, 4, 6, 8)
FEW_SHOT_VIDEOS = (50, 100, 200, 500)
FEW_SHOT_EPOCHS = 3
SCHEMES = ("answer only", "think only", "hybrid")
PRUNING_SIZE = 9
"""Eight sampled answers and the true one, as OraRL has them."""
PRUNING = {"orarl of 9": 0.0, "orarl of 9, half pruned": 0.5}
"""Methods of the pruning family: how much leaves each group."""
WASSERSTEIN = "grpo, Wasserstein"
"""The method of the reward family, whose other arm is the core's GRPO, rewarded by the IoU."""

QUERIES_PER_VIDEO = {"nonlinear, 1 query a video": 1, "nonlinear, 4 queries a video": 4}
"""Methods of the tree family: how many queries of a video may come in one step, prompts a step being the same."""

TESTS = {"far": (FAR, "answer"), "easy": (EASY, "answer"), "thinking": (HARD, "think")}
"""Tests besides the held-out hard videos, answering: out of domain, the easy stage, the other mode."""
START = "start"
"""The method of the elsewhere family that trains nothing: what others may gain or forget."""
NOISE = (0.1, 0.3)
"""Standard deviation of the errors of true starts and ends, as shares of the event's length."""

Family = Literal[
    "pilot", "core", "group size", "few shot", "hybrid", "pruning", "reward", "tree", "elsewhere", "noise", "rare hits"
]
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclass(frozen=True)
class PlannedRun:
    """One training from a seed's cold start."""

    family: Family
    method: str
    """One of METHODS; of the hybrid family one of SCHEMES, trained with TempSamp-R1 (nonlinear); one of PRUNING or
    QUERIES_PER_VIDEO, or WASSERSTEIN."""
    seed: int
    num_generations: int = 4
    num_videos: int | None = None
    """Training videos of a few-shot run; None: all."""
    rate: float = PILOT_RATES[0]
    """Learning rate, at its peak."""
    flags: dict[str, object] = field(default_factory=dict, compare=False)
    """What it adds to COMMON."""
    start: str = "cold"
    """One of STARTS."""
    noise: float = 0.0
    """Of the training annotations."""
    tests: tuple[str, ...] = ()
    """Of TESTS, taken when it is trained."""

    @property
    def name(self) -> str:
        parts = [self.family.replace(" ", "_"), self.method.replace(",", "").replace(" ", "_")]
        parts += [f"G{self.num_generations}"] if self.family == "group size" else []
        parts += [f"{self.num_videos}_videos"] if self.num_videos else []
        parts += [f"rate{self.rate:g}"] if self.family == "pilot" else []
        parts += [f"noise{self.noise:g}"] if self.noise else []
        return "/".join([*parts, f"seed{self.seed}"])


def phases(method: str, modes: Iterable[str], rate: float) -> str:
    """The `--phases` of a run whose stages have the modes given."""
    trainer = method if method in ("sft", "grpo") else "tempsamp"
    stages = zip(modes, STAGES, STAGE_SHARES, strict=True)
    return ",".join(f"{trainer}/{mode}:{steps}@{rate * share:g}" for mode, steps, share in stages)


def words(flags: dict[str, object]) -> list[str]:
    """The trainer's command line: the recipe, what all runs share, and `flags`."""
    return [f"--config={RECIPE}", *(f"--{name}={value}" for name, value in {**COMMON, **flags}.items())]


def few_shot_phases(method: str, num_queries: int, rate: float) -> str:
    """As many steps as take all queries `FEW_SHOT_EPOCHS` times."""
    trainer = method if method in ("sft", "grpo") else "tempsamp"
    return f"{trainer}/answer:{math.ceil(FEW_SHOT_EPOCHS * num_queries / PROMPTS_PER_STEP)}@{rate:g}"


def answering(method: str, num_generations: int, rate: float) -> dict[str, object]:
    """The settings in which methods differ."""
    shaping = {} if method in ("sft", "grpo") else {"shaping": method}
    return {"phases": phases(method, ["answer"] * len(STAGES), rate), "num_generations": num_generations, **shaping}


def pilot_runs() -> list[PlannedRun]:
    """Every method at every rate, on a seed that no other run has."""
    return [
        PlannedRun("pilot", method, PILOT_SEED, rate=rate, flags=answering(method, CORE_GROUP_SIZE, rate))
        for rate in PILOT_RATES
        for method in METHODS
    ]


def planned_runs(rate: float) -> list[PlannedRun]:
    """All runs at the rate chosen, in the order in which they are made: the paired seeds first, all methods of a seed
    together.
    """
    paired = [*_core(rate), *_beyond(rate), *_trees(rate), *_evidence(rate)]
    return [*paired, *_hybrid(rate), *_group_sizes(rate), *_few_shot(rate)]


def _core(rate: float) -> Iterator[PlannedRun]:
    for seed in SEEDS:
        for method in METHODS:
            yield PlannedRun("core", method, seed, rate=rate, flags=answering(method, CORE_GROUP_SIZE, rate))


def _beyond(rate: float) -> Iterator[PlannedRun]:
    """Pruning on and off, and GRPO with TimeLens2's reward."""
    for seed in SEEDS:
        for method, ratio in PRUNING.items():
            flags = {**answering("orarl", PRUNING_SIZE, rate), "prune_ratio": ratio}
            yield PlannedRun("pruning", method, seed, PRUNING_SIZE, rate=rate, flags=flags)
        flags = {**answering("grpo", CORE_GROUP_SIZE, rate), "rewards": "wasserstein"}
        yield PlannedRun("reward", WASSERSTEIN, seed, rate=rate, flags=flags)


def _trees(rate: float) -> Iterator[PlannedRun]:
    for seed in SEEDS:
        for method, queries in QUERIES_PER_VIDEO.items():
            flags = {**answering("nonlinear", CORE_GROUP_SIZE, rate), "queries_per_video": queries}
            yield PlannedRun("tree", method, seed, rate=rate, flags=flags)


def _evidence(rate: float) -> Iterator[PlannedRun]:
    """What holds of "RL generalises, SFT does not": other videos and the other mode, wrong truths, and rarer hits."""
    for seed in SEEDS:
        yield PlannedRun("elsewhere", START, seed, rate=rate, tests=tuple(TESTS))
        for method in ("sft", "grpo", "nonlinear"):
            given: dict[str, Any] = {"rate": rate, "flags": answering(method, CORE_GROUP_SIZE, rate)}
            yield PlannedRun("elsewhere", method, seed, tests=tuple(TESTS), **given)
            for noise in NOISE:
                yield PlannedRun("noise", method, seed, noise=noise, **given)
        for method in ("sft", "grpo", "mixed", "nonlinear"):
            flags = answering(method, CORE_GROUP_SIZE, rate)
            yield PlannedRun("rare hits", method, seed, rate=rate, flags=flags, start="rare")


def _hybrid(rate: float) -> Iterator[PlannedRun]:
    modes = {
        "answer only": ["answer"] * 4,
        "think only": ["think"] * 4,
        "hybrid": ["answer", "answer", "think", "think"],
    }
    shared = {"eval_modes": "answer+think", "max_completion_length": 64, "shaping": "nonlinear", "num_generations": 4}
    for seed in EXPLORATORY_SEEDS:
        for scheme in SCHEMES:
            flags = {**shared, "phases": phases("nonlinear", modes[scheme], rate)}
            yield PlannedRun("hybrid", scheme, seed, rate=rate, flags=flags)


def _group_sizes(rate: float) -> Iterator[PlannedRun]:
    """For `CORE_GROUP_SIZE` answers the core runs serve."""
    for seed in EXPLORATORY_SEEDS:
        for size in GROUP_SIZES:
            for method in ("grpo", "nonlinear") if size != CORE_GROUP_SIZE else ():
                yield PlannedRun("group size", method, seed, size, rate=rate, flags=answering(method, size, rate))


def _few_shot(rate: float) -> Iterator[PlannedRun]:
    """Their phases are set when the number of their queries is known."""
    for seed in EXPLORATORY_SEEDS:
        for num_videos in FEW_SHOT_VIDEOS:
            for method in ("sft", "grpo", "nonlinear"):
                flags = answering(method, CORE_GROUP_SIZE, rate)
                yield PlannedRun("few shot", method, seed, num_videos=num_videos, rate=rate, flags=flags)

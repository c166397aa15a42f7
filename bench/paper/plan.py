"""The runs of the campaign: one data set, one cold start per seed, and what is trained from it.

Every setting below is the same for all methods; how they were chosen is in bench/LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from tempsamp_fast.synthetic import SyntheticConfig

DATA = SyntheticConfig(
    num_train=2000,
    num_val=0,
    num_test=480,
    min_duration_s=12.0,
    max_duration_s=40.0,
    sizes=("64x64",),
    min_event_share=0.05,
    max_event_share=0.2,
)
"""Events of 3 s on average in videos of up to 40 s: a guess rarely hits, and no constant span does well."""

COMMON: dict[str, object] = {
    "random_crop": 0,
    "min_pixels": 784,
    "max_pixels": 784,
    "prompts_per_device": 16,
    "warmup_ratio": 0,
    "max_completion_length": 24,
}
COLD_START = {"phases": "sft:600@2e-3", "warmup_ratio": 0.05}
COLD_START_SEED = 1000
"""Added to a run's seed: the cold start takes the training samples in an order of its own."""

STAGES = (40, 40, 40, 40, 40)
RATES = ("1e-3", "1e-3", "1e-3", "5e-4", "2e-4")
"""Training is cut into stages, each followed by an evaluation."""

CORE_GROUP_SIZE = 4
METHODS = ("sft", "grpo", "mixed", "downscale", "anchor", "nonlinear", "orarl")
SEEDS = range(8)
EXPLORATORY_SEEDS = range(3)
GROUP_SIZES = (2, 4, 6, 8)
FEW_SHOT_VIDEOS = (50, 100, 200, 500)
FEW_SHOT_EPOCHS = 3
SCHEMES = ("answer only", "think only", "hybrid")

Family = Literal["core", "group size", "few shot", "hybrid"]


@dataclass(frozen=True)
class PlannedRun:
    """One training from a seed's cold start."""

    family: Family
    method: str
    """One of METHODS; of the hybrid family one of SCHEMES, trained with TempSamp-R1 (nonlinear)."""
    seed: int
    num_generations: int = 4
    num_videos: int | None = None
    """Training videos of a few-shot run; None: all."""
    flags: dict[str, object] = field(default_factory=dict, compare=False)
    """What it adds to COMMON."""

    @property
    def name(self) -> str:
        parts = [self.family.replace(" ", "_"), self.method.replace(" ", "_")]
        parts += [f"G{self.num_generations}"] if self.family == "group size" else []
        parts += [f"{self.num_videos}_videos"] if self.num_videos else []
        return "/".join([*parts, f"seed{self.seed}"])


def phases(method: str, modes: Iterable[str], steps: Iterable[int] = STAGES) -> str:
    """The `--phases` of a run: a stage each, with the modes in turn given."""
    trainer = method if method in ("sft", "grpo") else "tempsamp"
    stages = zip(modes, steps, RATES, strict=True)
    return ",".join(f"{trainer}/{mode}:{count}@{rate}" for mode, count, rate in stages)


def method_flags(method: str, num_generations: int) -> dict[str, object]:
    """The settings in which methods differ."""
    shaping = {} if method in ("sft", "grpo") else {"shaping": method}
    return {"phases": phases(method, ["answer"] * len(STAGES)), "num_generations": num_generations, **shaping}


def planned_runs() -> list[PlannedRun]:
    """All runs, in the order in which they are made: the paired seeds first, all methods of a seed together."""
    return [*_core(), *_hybrid(), *_group_sizes(), *_few_shot()]


def _core() -> Iterator[PlannedRun]:
    for seed in SEEDS:
        for method in METHODS:
            yield PlannedRun("core", method, seed, flags=method_flags(method, CORE_GROUP_SIZE))


def _hybrid() -> Iterator[PlannedRun]:
    modes = {
        "answer only": ["answer"] * 5,
        "think only": ["think"] * 5,
        "hybrid": ["answer", "answer", "think", "think", "think"],
    }
    shared = {"eval_modes": "answer+think", "max_completion_length": 64, "shaping": "nonlinear", "num_generations": 4}
    for seed in EXPLORATORY_SEEDS:
        for scheme in SCHEMES:
            flags = {**shared, "phases": phases("nonlinear", modes[scheme])}
            yield PlannedRun("hybrid", scheme, seed, flags=flags)


def _group_sizes() -> Iterator[PlannedRun]:
    """Of 4 answers the core runs serve."""
    for seed in EXPLORATORY_SEEDS:
        for size in GROUP_SIZES:
            for method in ("grpo", "nonlinear") if size != CORE_GROUP_SIZE else ():
                yield PlannedRun("group size", method, seed, size, flags=method_flags(method, size))


def _few_shot() -> Iterator[PlannedRun]:
    for seed in EXPLORATORY_SEEDS:
        for num_videos in FEW_SHOT_VIDEOS:
            for method in ("sft", "grpo", "nonlinear"):
                yield PlannedRun(
                    "few shot", method, seed, num_videos=num_videos, flags=method_flags(method, CORE_GROUP_SIZE)
                )  # its phases are set when the number of its queries is known

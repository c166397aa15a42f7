"""Training subsets drawn by difficulty and by the spans of a benchmark, as published recipes draw them.

A sample's offline IoUs are those of answers that a model gave to it before this training.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev

from tempsamp_fast.sample import Sample

NUM_BINS = 20
"""Of offline IoUs between 0 and 1."""
EASE, SPREAD = 0.05, 0.2
"""The mean IoU that TimeLens draws most of, and the deviation around it."""
RELEASE_EASE = 0.75
"""The difficulty that the release of TempSamp-R1 draws most of, with the same deviation."""
NUM_STRATA = 10


def timelens_weights(ious: Sequence[float]) -> list[float]:
    """Of samples by their mean offline IoU in [0, 1]: a bell around .05, over the number of samples in the same of 20
    bins, so that what is rare is not drawn less (TimeLens, arXiv 2512.14698).
    """
    counts = Counter(map(_bin, ious))
    return [_bell(iou, EASE) / counts[_bin(iou)] for iou in ious]


def timelens2_weights(ious: Sequence[Sequence[float]], p: float = 0.0, q: float = 2.0) -> list[float]:
    """Of samples by the offline IoUs of their answers: std**p * (1 - mean)**q (TimeLens2, arXiv 2607.17423)."""
    return [(pstdev(each) + 1e-8) ** p * (1 - fmean(each) + 1e-8) ** q for each in ious]


def _bin(iou: float) -> int:
    return min(int(iou * NUM_BINS), NUM_BINS - 1)


def _bell(value: float, centre: float) -> float:
    return math.exp(-0.5 * ((value - centre) / SPREAD) ** 2)


def draw(weights: Sequence[float], number: int, seed: int) -> list[int]:
    """`number` different indices, drawn one after the other by weight, in ascending order.

    The same seed draws nested subsets. Those of weight 0 come last. Raises ValueError when there are fewer.
    """
    if not 0 <= number <= len(weights):
        raise ValueError(f"draw_samples={number}: must be at most the {len(weights)} samples there are")
    rng = random.Random(seed)
    # The largest of u ** (1 / w): Efraimidis and Spirakis 2006, here by its logarithm.
    keys = [math.log(rng.random() or 1e-300) / weight if weight > 0 else -math.inf for weight in weights]
    return sorted(sorted(range(len(weights)), key=lambda index: (-keys[index], index))[:number])


def draw_by_stratum(
    weights: Sequence[float], strata: Sequence[object], shares: dict[object, float], number: int, seed: int
) -> list[int]:
    """As `draw`, so many of each stratum as its share of `number`; what a stratum lacks, the others give by weight.

    strata: of each index. shares: by stratum; those of strata without an index are left out and the rest scaled up.
    """
    members: dict[object, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    total = sum(shares.get(stratum, 0.0) for stratum in members)
    chosen: set[int] = set()
    for place, (stratum, indices) in enumerate(sorted(members.items(), key=lambda item: str(item[0]))):
        share = shares.get(stratum, 0.0) / total if total else 0.0
        wanted = min(round(number * share), len(indices), number - len(chosen))
        own = draw([weights[index] for index in indices], wanted, seed * 1009 + place)
        chosen |= {indices[index] for index in own}
    rest = [index for index in range(len(weights)) if index not in chosen]
    missing = min(number, len(weights)) - len(chosen)
    chosen |= {rest[index] for index in draw([weights[index] for index in rest], missing, seed)}
    return sorted(chosen)


def drawn_as_timelens(samples: Sequence[Sample], number: int, seed: int) -> list[Sample]:
    """TimeLens's: as many of each tenth of durations, by `timelens_weights`.

    Raises ValueError for a sample without offline IoUs, and when there are fewer samples.
    """
    weights = timelens_weights([fmean(_offline_ious(sample)) for sample in samples])
    order = sorted(range(len(samples)), key=lambda index: samples[index].duration_s)
    strata = [0] * len(samples)
    for place, index in enumerate(order):
        strata[index] = place * NUM_STRATA // len(order)
    return _chosen(samples, weights, strata, dict.fromkeys(range(NUM_STRATA), 1.0), number, seed)


def drawn_as_timelens2(samples: Sequence[Sample], number: int, seed: int) -> list[Sample]:
    """TimeLens2's: by `timelens2_weights`. Raises ValueError as `drawn_as_timelens` does."""
    chosen = draw(timelens2_weights([_offline_ious(sample) for sample in samples]), number, seed)
    return [samples[index] for index in chosen]


def drawn_as_release(samples: Sequence[Sample], number: int, seed: int, like: Sequence[Sample]) -> list[Sample]:
    """That of TempSamp-R1's release: lengths of spans and shares of the video that they cover as in the benchmark
    `like`, and difficulties in a bell around .75.

    Raises ValueError for a sample without a difficulty, and when there are fewer samples.
    """
    for sample in samples:
        if sample.difficulty is None:
            raise ValueError(f"draw='release': sample {sample.sample_id[:80]!r} has no difficulty")
    weights = [_bell(sample.difficulty or 0.0, RELEASE_EASE) for sample in samples]
    shares: dict[object, float] = {cell: float(count) for cell, count in Counter(map(span_cell, like)).items()}
    return _chosen(samples, weights, [span_cell(sample) for sample in samples], shares, number, seed)


def span_cell(sample: Sample) -> tuple[int, int]:
    """Where a sample lies in the joint histogram: doublings of its true spans' length, tenths of the video covered."""
    seconds = sum(end - start for start, end in sample.windows)
    return math.floor(math.log2(max(seconds, 1.0))), min(int(10 * seconds / sample.duration_s), 9)


def _chosen(
    samples: Sequence[Sample],
    weights: Sequence[float],
    strata: Sequence[object],
    shares: dict[object, float],
    number: int,
    seed: int,
) -> list[Sample]:
    if number > len(samples):
        raise ValueError(f"draw_samples={number}: must be at most the {len(samples)} samples there are")
    return [samples[index] for index in draw_by_stratum(weights, strata, shares, number, seed)]


def _offline_ious(sample: Sample) -> tuple[float, ...]:
    if not sample.offline_ious:
        raise ValueError(f"sample {sample.sample_id[:80]!r} has no offline IoUs to be drawn by")
    return sample.offline_ious

"""What one query about one video is: the types every other module shares, free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Span = tuple[float, float]
"""A (start, end) pair in seconds."""

Mode = Literal["answer", "think"]
"""Answer directly, or reason inside `<think>` first (chain of thought)."""

Task = Literal["grounding", "multi_grounding", "highlight"]
"""Find the one span, find every span, or rate the clips that match the query."""


AnswerForm = Literal["text", "example", "sentence", "json", "strict", "time_tags"]
"""How spans are asked for, written and read: the paper's text, that of its release, TimeLens's sentence, TimeLens2's
JSON list, OraRL's whole block, OMTG's time tags."""


@dataclass(frozen=True)
class Sample:
    """One query about one video, with its ground truth."""

    sample_id: str
    video: Path
    query: str
    duration_s: float
    windows: tuple[Span, ...]
    """True spans, each (start, end) in seconds; several when the query has several answers."""
    clip_scores: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)
    """Scores 0 to 4, one per annotator, by the index of the 2-second clip; empty outside highlight detection."""
    difficulty: float | None = None
    """As published with the data set (TimeLens); None where it publishes none."""
    offline_ious: tuple[float, ...] = ()
    """Of answers that a model gave before, as published with the data set (TimeLens2)."""
    reasoning: str | None = None
    """What is thought before the answer, where the annotations have it: the true answer of a think prompt begins so."""

    @property
    def video_id(self) -> str:
        return self.video.stem


def by_video(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The queries of each video, in order, videos by their first query."""
    found: dict[Path, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.video, []).append(sample)
    return list(found.values())

"""Published evaluation protocols: how each asks, which frames it shows, how it reads answers and what it counts.

Figures compare within one protocol only. Prompts have the shape of the published ones, in words of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tempsamp_fast.answers import read_block_pairs, read_json, read_pairs, read_time_tags
from tempsamp_fast.evaluation.events import event_scores, threshold_auc
from tempsamp_fast.evaluation.scoring import grounding_scores, row_spans
from tempsamp_fast.intervals import union_iou
from tempsamp_fast.rewards import best_iou, parse_spans
from tempsamp_fast.sample import AnswerForm, Sample, Span

OWN = "own"
"""In place of a protocol's name: frames, prompt and parser of the checkpoint's own training."""
BEYOND_S = (10.0, 20.0)
"""TimeLens takes an answer that it cannot read for a span so many seconds behind the end of the video."""


@dataclass(frozen=True)
class Budget:
    """The frames of a video; a token is a merged patch, and all frames are of at most `total_tokens` of them."""

    fps: float
    max_frames: int
    min_tokens: int | None = None
    """Of a frame."""
    max_pixels: int | None = None
    """Of a frame."""
    total_tokens: int | None = None

    def frames(self, factor: int, counts_every_frame: bool) -> dict[str, Any]:
        """As settings of `DataConfig`.

        factor: pixels along one side of a merged patch.
        counts_every_frame: as of `Geometry`; the published numbers count the two frames of a temporal patch once.
        """
        total = self.total_tokens and self.total_tokens * factor**2 * (2 if counts_every_frame else 1)
        pixels = {
            "min_pixels": self.min_tokens and self.min_tokens * factor**2,
            "max_pixels": self.max_pixels,
            "total_pixels": total,
        }
        return {"sampling": "qwen_utils", "fps": self.fps, "max_frames": self.max_frames, **pixels}

    def __str__(self) -> str:
        parts = [f"{self.fps:g} fps, at most {self.max_frames} frames"]
        parts += [f"at least {self.min_tokens} tokens each"] if self.min_tokens else []
        parts += [f"at most {self.max_pixels} pixels each"] if self.max_pixels else []
        parts += [f"{self.total_tokens} tokens in all"] if self.total_tokens else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Protocol:
    """One published way to evaluate."""

    name: str
    answer_form: AnswerForm
    """How it asks, and how it cleans the query."""
    budget: Budget | None
    """None: the checkpoint's own frames."""
    read: Callable[[str], list[Span] | None]
    rule: str
    """How it reads, in words."""
    answers: Literal["last", "first", "all"] = "first"
    """Which of the spans that were read count."""
    rounds: bool = False
    """Both ends to whole seconds, half to even."""
    is_unread_beyond: bool = False
    """An answer that cannot be read counts as `BEYOND_S`; else as IoU 0."""
    metrics: Literal["span", "union", "events"] = "span"
    has_auc: bool = False
    """Whether `threshold_auc` is told too."""
    max_completion_length: int = 2048

    def spans(self, row: Mapping[str, Any]) -> list[Span] | None:
        """What counts of a prediction row, its `text` or else its spans; None where nothing can be read."""
        spans = row_spans(row, self.read)
        if spans is None:
            return None
        if self.answers != "all":
            spans = spans[-1:] if self.answers == "last" and row.get("text") is not None else spans[:1]
        return [(float(round(start)), float(round(end))) for start, end in spans] if self.rounds else spans

    def iou(self, spans: Sequence[Span] | None, sample: Sample) -> float:
        """Of what `spans` gave, with the window that it fits best, or of both unions."""
        if spans is None and self.is_unread_beyond:
            spans = [(sample.duration_s + BEYOND_S[0], sample.duration_s + BEYOND_S[1])]
        if self.metrics == "span":
            return best_iou(spans[0] if spans else None, sample.windows)
        return union_iou(spans or [], sample.windows)

    def scores(self, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Its metrics in [0, 1] over one prediction row per sample, and `parse_rate`, the share of answers read.

        Raises ValueError when there is no query, and as `row_spans` does.
        """
        found = [self.spans(row) for row in rows]
        parse_rate = {"parse_rate": sum(spans is not None for spans in found) / max(len(found), 1)}
        if self.metrics == "events":
            return event_scores([sample.windows for sample in samples], [spans or [] for spans in found]) | parse_rate
        ious = [self.iou(spans, sample) for spans, sample in zip(found, samples, strict=True)]
        area = {"auc": threshold_auc(ious)} if self.has_auc else {}
        return grounding_scores(ious) | area | parse_rate

    def __str__(self) -> str:
        parts = [str(self.budget or "the checkpoint's own frames"), self.rule]
        parts += ["whole seconds"] if self.rounds else []
        unread = f"{BEYOND_S[0]:g} to {BEYOND_S[1]:g} s beyond the video" if self.is_unread_beyond else "IoU 0"
        return f"{self.name}: {', '.join([*parts, f'an answer not read counts as {unread}'])}"


_TIMELENS_BUDGET = Budget(2.0, 768, min_tokens=64, max_pixels=768 * 32 * 32, total_tokens=14_336)
_TIMELENS = Protocol(
    "timelens",
    "sentence",
    _TIMELENS_BUDGET,
    read_pairs,
    "the first pair, tags or not",
    rounds=True,
    is_unread_beyond=True,
    max_completion_length=512,
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "paper",
            "text",
            Budget(2.0, 768, min_tokens=16, max_pixels=768 * 28 * 28, total_tokens=3584),
            lambda text: parse_spans(text) or None,
            "the last pair of the last answer block",
            answers="last",
        ),
        replace(_TIMELENS, name="release", answer_form="example", budget=replace(_TIMELENS_BUDGET, min_tokens=4)),
        _TIMELENS,
        Protocol(
            "timelens2",
            "json",
            Budget(4.0, 2048, max_pixels=640 * 640, total_tokens=128_000),
            read_json,
            "a JSON list of spans, their union",
            answers="all",
            metrics="union",
        ),
        Protocol(
            "orarl",
            "strict",
            Budget(4.0, 2048, max_pixels=409_600, total_tokens=128_000),
            read_block_pairs,
            "the first pair of the last answer block",
            rounds=True,
            is_unread_beyond=True,
            max_completion_length=128,
        ),
        Protocol(
            "omtg",
            "time_tags",
            None,
            read_time_tags,
            "every span in time tags",
            answers="all",
            metrics="events",
        ),
    )
}
"""By name; the facts of each are in docs/evaluation.md."""


def protocol_for(name: str, test: str | None) -> Protocol:
    """The protocol of that name for a data set of `catalogue.DATASETS`: on TimeLens-Bench, whose queries have one span,
    `timelens2` takes the first span of an answer; on VUE-TR it shows a frame a second and tells the area too.
    """
    protocol = PROTOCOLS[name]
    if name == "timelens2" and test and test.startswith("timelens-bench"):
        return replace(protocol, answers="first", rule="the first span of a JSON list")
    if name == "timelens2" and protocol.budget and test in ("vue-tr", "vue-tr-v2"):
        return replace(protocol, budget=replace(protocol.budget, fps=1.0), has_auc=True)
    if name == "timelens2" and protocol.budget and test in ("momentseeker", "ego4d-nlq"):
        return replace(protocol, budget=replace(protocol.budget, fps=2.0, max_pixels=480 * 480))
    return protocol

"""What annotation files of every format come to: one record per query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNTOLD, FROM_FILE = object(), object()
"""Durations that are not told: as long as the last span, and that of the video itself."""


@dataclass(frozen=True)
class Record:
    """One query as its file has it, unchecked; `place` says where that is."""

    place: str
    sample_id: str
    video_id: str
    query: Any
    duration: Any
    windows: Any
    clip_scores: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    difficulty: Any = None
    offline_ious: tuple[float, ...] = ()
    reasoning: Any = None

"""Held-out videos on a timeline: frames, the true span, and what every run answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tempsamp_fast.data.frame_folder import thumbnails
from tempsamp_fast.report.plots import drawn_part, times_text
from tempsamp_fast.report.runs import RunRecord
from tempsamp_fast.video import VideoError

NUM_FRAMES = 24
EVERY = 3
"""Of the frames that are played, what the strip above the bars shows."""
FRAME_HEIGHT = 108
TRUE_COLOUR = "#444444"


def pick_samples(runs: Sequence[RunRecord], mode: str, num_samples: int) -> list[str]:
    """Ids of samples that every run answered, at equal distances from the first run's worst answer to its best."""
    answered = [{row["sample_id"] for row in run.answers[mode]} for run in runs]
    common = set.intersection(*answered)
    rows = sorted((row for row in runs[0].answers[mode] if row["sample_id"] in common), key=lambda row: row["iou"])
    if len(rows) <= num_samples:
        return [row["sample_id"] for row in rows]
    step = (len(rows) - 1) / max(num_samples - 1, 1)
    return [rows[round(index * step)]["sample_id"] for index in range(num_samples)]


def gallery(runs: Sequence[RunRecord], colours: Mapping[str, str], num_samples: int) -> str:
    """The HTML of the gallery, from the runs' answers in the first mode that all of them have; empty without any."""
    modes = [mode for mode in runs[0].answers if all(mode in run.answers for run in runs)]
    if not modes or num_samples == 0:
        return ""
    rows_by_run = [{row["sample_id"]: row for row in run.answers[modes[0]]} for run in runs]
    parts = []
    for sample_id in pick_samples(runs, modes[0], num_samples):
        answers = [rows[sample_id] for rows in rows_by_run]
        first = answers[0]
        bars = [_bar("true", first["windows"], first["duration_s"], TRUE_COLOUR, "")]
        for run, answer in zip(runs, answers, strict=True):
            spans = [answer["span"]] if answer["span"] else []
            note = f"IoU {100 * answer['iou']:.0f} %" if spans else "no answer"
            bars.append(_bar(run.label, spans, first["duration_s"], colours[run.method], note))
        strip = _strip(first)
        parts.append(
            f'<article{" class=plays" if "<img" in strip else ""} data-duration="{first["duration_s"]:.3f}">'
            f'<h3>“{escape(first["query"])}”</h3><p class="file">{escape(Path(first["video"]).name)}, '
            f"{first['duration_s']:.1f} s</p>{strip}{''.join(bars)}</article>"
        )
    return "".join(parts)


def _bar(label: str, spans: Sequence[Sequence[float]], duration_s: float, colour: str, note: str) -> str:
    blocks = []
    for start, end in spans:
        left, right = (100 * time / duration_s for time in drawn_part((start, end), duration_s))
        blocks.append(f'<i style="left:{left:.2f}%;width:{right - left:.2f}%;background:{colour}"></i>')
    said = ", ".join(filter(None, (*map(times_text, spans), note)))
    return (
        f'<div class="bar"><span class="label">{escape(label)}</span>'
        f'<span class="track">{"".join(blocks)}<span class="now"></span></span>'
        f'<span class="note">{escape(said)}</span></div>'
    )


def _strip(answer: Mapping[str, Any]) -> str:
    """Frames at equal distances, above the track that the bars are drawn on; the reason where there are none."""
    times_s = [answer["duration_s"] * (index + 0.5) / NUM_FRAMES for index in range(NUM_FRAMES)]
    try:
        pictures = thumbnails(answer["video"], times_s, FRAME_HEIGHT)
    except VideoError as error:
        return f'<p class="missing">no frames: {escape(str(error))}</p>'
    images = [
        f'<img{"" if index % EVERY == EVERY // 2 else " class=between"} alt="{time:.1f} s" '
        f'src="data:image/jpeg;base64,{_jpeg(picture.permute(1, 2, 0).numpy())}">'
        for index, (picture, time) in enumerate(zip(pictures, times_s, strict=True))
    ]
    return (
        '<div class="strip"><span></span><span class="screen"><img alt="the frame at the time below"></span></div>'
        '<div class="strip"><span class="label"><button>Play</button></span><span class="controls">'
        '<input type="range" min="0" max="1000" value="0" aria-label="time"></span><output class="note"></output></div>'
        f'<div class="strip"><span></span><span class="frames">{"".join(images)}</span></div>'
    )


def _jpeg(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=75)
    return base64.b64encode(buffer.getvalue()).decode()

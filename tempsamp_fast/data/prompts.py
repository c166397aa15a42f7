"""What the model is asked, and the answer text made from the ground truth (the off-policy completion)."""

from __future__ import annotations

import math
from typing import Literal, get_args

from tempsamp_fast.rewards import highlight_targets
from tempsamp_fast.sample import Mode, Sample, Span, Task

CotOffPolicy = Literal["template", "answer_only", "skip"]
"""Off-policy text in think mode: a think block naming the span then the answer; the answer alone; no text at all."""

SHORTEST_S = 0.01
"""The shortest video and the shortest span that an answer can name."""

_ASK = {
    "grounding": 'When does "{query}" happen in the video?',
    "multi_grounding": 'Find every time span of the video in which "{query}" happens.',
    "highlight": 'Which 2-second clips of the video show "{query}" best? Rate each one from 1 to 5.',
}
_THINK = (
    "First reason inside <think> </think>, with each time or range you rely on inside <timestep> </timestep>, "
    "then answer."
)
_FORMAT = {
    "grounding": "Give its start and end in seconds with two decimals, as <answer> start time to end time </answer>",
    "multi_grounding": "Give starts and ends in seconds with two decimals, as "
    "<answer> start time to end time, start time to end time </answer>",
    "highlight": "Give the clips' start times in seconds and their ratings, as "
    "<answer> The highlight timestamps are in the 82, 84, 86 seconds. "
    "Their saliency scores are 1.3, 1.7, 2.0. </answer>",
}


def normalise_query(query: str) -> str:
    """Lower-cased and stripped, without trailing full stops; the form in which training and evaluation ask."""
    return query.lower().strip().rstrip(". ")


def question(query: str, mode: Mode, task: Task = "grounding") -> str:
    """The user turn's text that goes with the video."""
    ask = _ASK[task].format(query=normalise_query(query))
    return " ".join([ask, *([_THINK] if mode == "think" else []), _FORMAT[task]])


def off_policy_text(
    sample: Sample, mode: Mode, cot_off_policy: CotOffPolicy = "template", task: Task = "grounding"
) -> str | None:
    """The ground truth as the model should have said it, without an end-of-sequence token; None for `skip`.

    None too where there is nothing to say: no clip scores for highlights, a video shorter than `SHORTEST_S`. Raises
    ValueError for an unknown `cot_off_policy`.
    """
    if cot_off_policy not in get_args(CotOffPolicy):
        raise ValueError(f"cot_off_policy {cot_off_policy!r}: choose from {', '.join(get_args(CotOffPolicy))}")
    windows = sample.windows[:1] if task == "grounding" else sample.windows
    spans = [text for window in windows if (text := span_text(window, sample.duration_s))]
    said = _highlights(sample) if task == "highlight" else ", ".join(spans)
    if not said:
        return None
    answer = f"<answer> {said} </answer>"
    if mode == "answer" or cot_off_policy == "answer_only":
        return answer
    if cot_off_policy == "skip":
        return None
    timesteps = ", ".join(f"<timestep> {span} </timestep>" for span in spans)
    return f"<think> The video shows it at {timesteps}. </think> {answer}"


def span_text(span: Span, duration_s: float) -> str | None:
    """`12.54 to 17.83`: seconds with two decimals, inside the video and never empty; None where that is not possible.

    What would round to nothing is widened to a hundredth of a second.
    """
    last = math.floor(100 * duration_s + 1e-6)
    start, end = (min(max(round(100 * round(time, 2)), 0), last) for time in span)
    start = min(start, last - 1)
    return f"{start / 100:.2f} to {max(end, start + 1) / 100:.2f}" if start >= 0 else None


def _highlights(sample: Sample) -> str:
    targets = highlight_targets(sample)
    if not targets:
        return ""
    timestamps = ", ".join(f"{timestamp:g}" for timestamp in targets)
    scores = ", ".join(f"{score:.1f}" for score in targets.values())
    return f"The highlight timestamps are in the {timestamps} seconds. Their saliency scores are {scores}."

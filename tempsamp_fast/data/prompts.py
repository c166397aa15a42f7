"""What the model is asked, and the answer text made from the ground truth (the off-policy completion)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tempsamp_fast.rewards import highlight_targets
from tempsamp_fast.sample import AnswerForm, Mode, Sample, Span, Task

CotOffPolicy = Literal["template", "answer_only", "skip"]
"""Off-policy text in think mode: a think block naming the span then the answer; the answer alone; no text at all."""

SHORTEST_S = 0.01
"""The shortest video and the shortest span that an answer can name."""

_ASK: dict[Task, str] = {
    "grounding": 'When does "{query}" happen in the video?',
    "multi_grounding": 'Find every time span of the video in which "{query}" happens.',
    "highlight": 'Which 2-second clips of the video show "{query}" best? Rate each one from 1 to 5.',
}
_THINK = (
    "First reason inside <think> </think>, with each time or range you rely on inside <timestep> </timestep>, "
    "then answer."
)
_FORMAT: dict[Task, str] = {
    "grounding": "Give its start and end in seconds with two decimals, as <answer> start time to end time </answer>",
    "multi_grounding": "Give starts and ends in seconds with two decimals, as "
    "<answer> start time to end time, start time to end time </answer>",
    "highlight": "Give the clips' start times in seconds and their ratings, as "
    "<answer> The highlight timestamps are in the 82, 84, 86 seconds. "
    "Their saliency scores are 1.3, 1.7, 2.0. </answer>",
}


FIELDS = ("query", "duration", "answer_form")
"""What a template of one's own may name: the query as it is asked, the video's length in seconds with one decimal, and
the sentence that tells the form of the answer."""


def normalise_query(query: str) -> str:
    """Lower-cased and stripped, without trailing full stops; the form in which training and evaluation ask."""
    return query.lower().strip().rstrip(". ")


def collapse_query(query: str) -> str:
    """With single spaces, without full stops at either end, its case kept (TimeLens)."""
    return " ".join(query.split()).strip(".").strip()


@dataclass(frozen=True)
class QuestionForm:
    """How an answer form asks and writes; of the tasks that it does not name, none can be asked so."""

    clean: Callable[[str], str]
    """The form in which the query is asked."""
    ask: Mapping[Task, str]
    says: Mapping[Task, str]
    """The form of the answer, in the words of the question."""
    write: Callable[[Sequence[str]], str]
    """An answer that names spans, each given as `12.54 to 17.83`."""
    names_all: bool = False
    """Every span, also where the task is one."""
    thinks: bool = True


def _both(text: str) -> dict[Task, str]:
    return {"grounding": text, "multi_grounding": text}


def _short(time: str) -> str:
    """`12` for `12.00`."""
    return time.rstrip("0").rstrip(".")


_ALL_SPANS = _both(_ASK["multi_grounding"])
QUESTION_FORMS: dict[AnswerForm, QuestionForm] = {
    "text": QuestionForm(normalise_query, _ASK, _FORMAT, lambda spans: f"<answer> {', '.join(spans)} </answer>"),
    "example": QuestionForm(
        normalise_query,
        {"grounding": _ASK["grounding"]},
        {
            "grounding": "Give its start and end in seconds with two decimals inside <answer> </answer>, for example "
            "<answer> 12.5 to 17.8 </answer>"
        },
        lambda spans: f"<answer> {spans[0]} </answer>",
    ),
    "sentence": QuestionForm(
        collapse_query,
        {"grounding": "Which event of the video does the sentence '{query}' describe? Find where it starts and ends."},
        {"grounding": "Answer in this form: The event happens in <start time> - <end time> seconds."},
        lambda spans: f"The event happens in {spans[0].replace(' to ', ' - ')} seconds.",
        thinks=False,
    ),
    "json": QuestionForm(
        collapse_query,
        _ALL_SPANS,
        _both(
            "Give all of them as one JSON list of pairs in seconds inside <answer> </answer>, for example "
            "<answer>[[0, 3.5], [10, 12]]</answer>"
        ),
        lambda spans: f"<answer>[{', '.join('[' + span.replace(' to ', ', ') + ']' for span in spans)}]</answer>",
        names_all=True,
    ),
    "strict": QuestionForm(
        collapse_query,
        {"grounding": _ASK["grounding"]},
        {
            "grounding": "Give its start and end in seconds as start time to end time inside <answer> </answer>, for "
            "example <answer>12 to 18</answer>"
        },
        lambda spans: f"<answer>{' to '.join(map(_short, spans[0].split(' to ')))}</answer>",
    ),
    "time_tags": QuestionForm(
        str.strip,
        _ALL_SPANS,
        _both("Give each of them as <time>start - end seconds</time>."),
        lambda spans: " ".join(f"<time>{span.replace(' to ', ' - ')} seconds</time>" for span in spans),
        names_all=True,
        thinks=False,
    ),
}


def question_form(answer_form: AnswerForm, mode: Mode, task: Task) -> QuestionForm:
    """The form by its name. Raises ValueError for a task or a mode that it cannot be asked in."""
    form = QUESTION_FORMS[answer_form]
    if task not in form.ask:
        raise ValueError(f"answer_form={answer_form!r} cannot ask for the task {task}: choose {' or '.join(form.ask)}")
    if mode == "think" and not form.thinks:
        raise ValueError(f"answer_form={answer_form!r} has no thoughts: choose the mode answer, or another form")
    return form


def question(
    query: str,
    mode: Mode,
    task: Task = "grounding",
    answer_form: AnswerForm = "text",
    template: str | None = None,
    duration_s: float = 0.0,
) -> str:
    """The user turn's text that goes with the video; by a template with the fields of `FIELDS`, if one is given.

    Raises ValueError as `question_form` does.
    """
    form = question_form(answer_form, mode, task)
    asked = form.clean(query)
    if template is not None:
        return template.format(query=asked, duration=f"{duration_s:.1f}", answer_form=form.says[task])
    return " ".join([form.ask[task].format(query=asked), *([_THINK] if mode == "think" else []), form.says[task]])


def off_policy_text(
    sample: Sample,
    mode: Mode,
    cot_off_policy: CotOffPolicy = "template",
    task: Task = "grounding",
    answer_form: AnswerForm = "text",
) -> str | None:
    """The ground truth as the model should have said it, without an end-of-sequence token; None for `skip`.

    None too where there is nothing to say: no clip scores for highlights, a video shorter than `SHORTEST_S`. Raises
    ValueError for an unknown `cot_off_policy`, and as `question_form` does.
    """
    if cot_off_policy not in get_args(CotOffPolicy):
        raise ValueError(f"cot_off_policy {cot_off_policy!r}: choose from {', '.join(get_args(CotOffPolicy))}")
    form = question_form(answer_form, mode, task)
    windows = sample.windows[:1] if task == "grounding" and not form.names_all else sample.windows
    spans = [text for window in windows if (text := span_text(window, sample.duration_s))]
    said = [_highlights(sample)] if task == "highlight" else spans
    if not any(said):
        return None
    answer = form.write(said)
    if mode == "answer" or cot_off_policy == "answer_only":
        return answer
    if cot_off_policy == "skip":
        return None
    if sample.reasoning is not None:
        return f"<think> {sample.reasoning} </think> {answer}"
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

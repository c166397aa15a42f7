"""Asking the model every held-out query, greedily, and keeping what it said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tempsamp_fast.batch import Prompt
from tempsamp_fast.data.loader import PromptLoader
from tempsamp_fast.evaluation.protocols import Protocol
from tempsamp_fast.learning.groups import Sampler
from tempsamp_fast.rewards import answered_span, best_iou, is_outside
from tempsamp_fast.sample import AnswerForm, Mode, Sample, by_video
from tempsamp_fast.system.files import own_folder, write_file
from tempsamp_fast.system.progress import Progress
from tempsamp_fast.system.ranks import is_first_rank, num_ranks, of_all_ranks, own_rank

PROGRESS_S = 10.0


def evaluate(
    samples: Sequence[Sample],
    mode: Mode,
    sampler: Sampler,
    loader: PromptLoader,
    batch_size: int,
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
    is_stopping: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """One row per sample, in order, shared out over the ranks: what was asked, the answer's text, its span and IoU.

    Queries of one video are asked together, so that it is decoded, encoded and prefilled once.

    is_stopping: asked before every batch, by every rank alike; once it says so the evaluation is dropped: None.

    A sample that had to be skipped leaves an empty text, which scores 0 like any answer that does not parse, and a row
    that says so.
    """
    texts: dict[str, str] = {}
    size = max(1, min(batch_size, math.ceil(len(samples) / num_ranks())))
    own = [of_ranks[own_rank()] for of_ranks in rounds(samples, size, num_ranks())]
    with Progress(len(samples), every_s=PROGRESS_S) if is_first_rank() else nullcontext() as progress:
        # Every rank samples equally often, as partitioned parameters need it, if only an answer that others have too.
        for batch in own:
            if is_stopping():
                return None
            prompts = loader.prompts(batch, [mode] * len(batch)) or _first_prompt(samples, mode, loader)
            answers = sampler(prompts, [1] * len(prompts)) if prompts else []
            for prompt, (completion,) in zip(prompts, answers, strict=True):
                texts[prompt.sample.sample_id] = completion.text
            if progress:
                progress.update(f"evaluation/{mode}", {}, by=size * num_ranks())
    texts = {sample_id: text for part in of_all_ranks(texts) for sample_id, text in part.items()}
    skipped: dict[str, Any] = {"skipped": True}
    return [
        answer_row(sample, texts.get(sample.sample_id, ""), require_tags, answer_form)
        | ({} if sample.sample_id in texts else skipped)
        for sample in samples
    ]


def rounds(samples: Sequence[Sample], batch_size: int, num_ranks: int) -> list[list[list[Sample]]]:
    """Batches by round and rank: those of a round have videos of like length, and whom one gave more the next gives
    less. In the last round ranks may have nothing.
    """
    longest_first = sorted(by_video(samples), key=lambda queries: -queries[0].duration_s)
    ordered = [sample for queries in longest_first for sample in queries]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    batches += [[]] * (-len(batches) % num_ranks)
    dealt = [batches[start : start + num_ranks] for start in range(0, len(batches), num_ranks)]
    return [of_ranks[:: -1 if index % 2 else 1] for index, of_ranks in enumerate(dealt)]


def _first_prompt(samples: Sequence[Sample], mode: Mode, loader: PromptLoader) -> list[Prompt]:
    """That of the first sample whose video can be read; the same on every rank."""
    return next((prompts for sample in samples if (prompts := loader.prompts([sample], [mode]))), [])


def answer_row(
    sample: Sample,
    text: str,
    require_tags: bool = True,
    answer_form: AnswerForm = "text",
    protocol: Protocol | None = None,
) -> dict[str, Any]:
    """What was asked and answered, ready for JSON; read by `protocol`, where there is one."""
    spans = protocol.spans({"text": text}) if protocol else None
    span = (spans[0] if spans else None) if protocol else answered_span(text, answer_form, require_tags)
    return ({"spans": spans} if protocol else {}) | {
        "sample_id": sample.sample_id,
        "video": str(sample.video),
        "query": sample.query,
        "duration_s": sample.duration_s,
        "windows": sample.windows,
        "text": text,
        "span": span,
        "iou": protocol.iou(spans, sample) if protocol else best_iou(span, sample.windows),
        "outside_video": is_outside(span, sample.duration_s),
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write evaluation rows as JSON lines; `python -m tempsamp_fast.score` reads them as predictions."""
    own_folder(path.parent)
    write_file(path, "".join(json.dumps(row) + "\n" for row in rows))

"""The embedded data set where a run asks for it, drawn when it is first asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.prompts import QUESTION_FORMS, off_policy_text, question
from tempsamp_fast.embedded.model import build_tiny_checkpoint
from tempsamp_fast.embedded.videos import SyntheticConfig, generate
from tempsamp_fast.sample import AnswerForm, Mode, Sample, Task
from tempsamp_fast.system.files import fresh_folder
from tempsamp_fast.system.progress import EVERY_S, Progress
from tempsamp_fast.system.ranks import made_by_first_rank


def with_embedded_data(data: DataConfig) -> DataConfig:
    """Settings whose `annotations="synthetic"` are files; called by every rank. Others come back as they are."""
    if data.annotations != "synthetic":
        return data
    folder = made_by_first_rank(lambda: draw_data_set(Path(data.synthetic_dir), embedded_videos(data)))
    return dataclasses.replace(
        data,
        annotations=str(folder / "annotations/train.json"),
        eval_annotations=str(folder / "annotations/test.json"),
        videos=str(folder / "videos"),
    )


def embedded_videos(data: DataConfig) -> SyntheticConfig:
    """What `synthetic_videos` asks for."""
    train, val, test = data.num_synthetic_videos()
    return SyntheticConfig(num_train=train, num_val=val, num_test=test)


def embedded_checkpoint(
    folder: Path, samples: Sequence[Sample], task: Task, family: str, seed: int, answer_form: AnswerForm = "text"
) -> str:
    """The embedded model in `folder`, its tokenizer learned from what is asked and answered; called by every rank."""
    modes: tuple[Mode, ...] = ("answer", "think") if QUESTION_FORMS[answer_form].thinks else ("answer",)
    texts = [
        text
        for sample in samples
        for mode in modes
        for text in (
            question(sample.query, mode, task, answer_form),
            off_policy_text(sample, mode, task=task, answer_form=answer_form) or "",
        )
    ]
    return str(made_by_first_rank(lambda: build_tiny_checkpoint(fresh_folder(folder), texts, family, seed)))


def draw_data_set(folder: Path, videos: SyntheticConfig) -> Path:
    """`generate` with its progress shown."""
    with Progress(videos.num_train + videos.num_val + videos.num_test, every_s=EVERY_S) as progress:
        show = lambda done, _: progress.update("drawing videos", {}, by=done - progress.done)
        return generate(folder, videos, on_progress=show)

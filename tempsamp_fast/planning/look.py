"""Looking before the run: is every video there, and does the longest prompt fit a row?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.prompts import QUESTION_FORMS, question
from tempsamp_fast.model.families import geometry_of
from tempsamp_fast.planning.estimate import FRAME_SIZE, TEXT_TOKENS, num_frames, text_and_video_tokens, video_grid
from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.system.ranks import is_first_rank
from tempsamp_fast.video.probe import header_facts

BYTES_PER_TOKEN = 4
"""Of plain text, where no tokenizer is there to count."""
WHAT_TO_DO = "or leave such samples out with --on_bad_sample skip"
logger = logging.getLogger(__name__)


def look_for_videos(samples: Sequence[Sample], folder: str | Path, on_bad: str, setting: str = "videos") -> None:
    """Stat every video once. With `raise`, ValueError that says how many are missing, which first, and what to do.

    With `skip` that is a warning, but for a folder that is not there.
    """
    every = dict.fromkeys(sample.video for sample in samples)
    missing = [video for video in every if not (video.is_file() or video.is_dir())]
    if samples and not Path(folder).is_dir():
        raise ValueError(
            f"{setting}={str(folder)!r}: no such folder, so all {len(every)} videos are missing, the first "
            f"{missing[0] if missing else next(iter(every))}; give the folder that holds the files with --{setting}"
        )
    if missing:
        names = ", ".join(str(video) for video in missing[:3]) + (", ..." if len(missing) > 3 else "")
        _tell(
            f"{setting}={str(folder)!r}: {len(missing)} of {len(every)} videos are missing: {names}; put them there, "
            f"name their folder with --{setting}, {WHAT_TO_DO}",
            on_bad,
        )


def look_for_all_videos(data: DataConfig, train: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Those of a run, as `look_for_videos` does."""
    look_for_videos(train, data.videos or "", data.on_bad_sample)
    setting = "eval_videos" if data.eval_videos else "videos"
    look_for_videos(held_out, data.eval_videos or data.videos or "", data.on_bad_sample, setting)


def look_at_prompts(
    samples: Sequence[Sample],
    data: DataConfig,
    model_config: Any,
    max_tokens: int,
    count: Callable[[Sample], int] | None = None,
    modes: Sequence[Mode] = get_args(Mode),
) -> None:
    """By arithmetic on all prompts, and if one is too long with its video's own frame size. Tells as the videos' look.

    modes: in which they are asked.
    count: the text's tokens, the chat format and a placeholder included; None: from its bytes.
    """
    geometry = geometry_of(model_config, data.min_pixels, data.max_pixels, data.total_pixels)

    form = data.answer_form
    asked_in = [mode for mode in modes if mode == "answer" or QUESTION_FORMS[form].thinks]

    def estimated_text(sample: Sample) -> int:
        num_bytes = max(len(question(sample.query, mode, data.task, form).encode()) for mode in asked_in)
        return TEXT_TOKENS + num_bytes // BYTES_PER_TOKEN

    counts = {sample.duration_s: num_frames(sample.duration_s, data) for sample in samples}
    grids = {number: video_grid(geometry, number, FRAME_SIZE) for number in set(counts.values())}

    def tokens(sample: Sample, text: int, grid: tuple[int, int, int] | None = None) -> int:
        return text_and_video_tokens(grid or grids[counts[sample.duration_s]], model_config, text)

    lengths = [tokens(sample, estimated_text(sample)) for sample in samples]
    if not samples:
        return
    index = max(range(len(samples)), key=lengths.__getitem__)
    longest = samples[index]
    grid = None
    if lengths[index] > max_tokens:
        try:
            facts = header_facts(longest.video)
            grid = video_grid(geometry, num_frames(facts.duration_s, data), (facts.height, facts.width))
        except (ValueError, OSError):
            pass  # that is told where the video is read
    number = tokens(longest, count(longest) if count else estimated_text(longest), grid)
    if number > max_tokens:
        too_long = max(1, sum(each > max_tokens for each in lengths))
        _tell(
            f"max_tokens_per_row={max_tokens}: about {too_long} of {len(samples)} prompts are longer, the longest that "
            f"of sample {longest.sample_id[:80]!r} with {number} tokens ({len(longest.query)} characters of query, "
            f"video {longest.video}); raise it, shorten the query, lower --fps or --max_pixels, {WHAT_TO_DO}",
            data.on_bad_sample,
        )


def _tell(complaint: str, on_bad: str) -> None:
    if on_bad == "raise":
        raise ValueError(complaint)
    if is_first_rank():
        logger.warning("%s", complaint)

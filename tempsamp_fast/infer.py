"""Ask a trained model when something happens: `python -m tempsamp_fast.infer --model DIR --video FILE --query TEXT`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from tempsamp_fast.sample import Mode, Sample
from tempsamp_fast.system.device import prepare_environment
from tempsamp_fast.system.files import log_printably, one_line
from tempsamp_fast.video import BackendName


def infer(
    model: str,
    video: Path,
    query: str,
    mode: Mode = "answer",
    max_completion_length: int = 256,
    require_tags: bool = True,
    video_backend: BackendName = "auto",
    base: str | None = None,
) -> dict[str, Any]:
    """The greedy answer to one query: `span` in seconds (None if it does not parse), `text`, `duration_s`.

    model: a run folder, whose newest checkpoint answers, a checkpoint folder, or a hub name.

    `outside_video` says that the span goes on beyond the video.

    Frames are taken as the checkpoint was trained (`video.json` beside its weights), by `video_backend`; `base` is as
    of `Answerer`. Raises ValueError naming a bad checkpoint, video or query.
    """
    from tempsamp_fast.data.frame_folder import duration_of
    from tempsamp_fast.evaluation.answerer import Answerer
    from tempsamp_fast.rewards import answered_span, is_outside
    from tempsamp_fast.rollout.generate import SamplingParams
    from tempsamp_fast.run.checkpoint import model_folder, read_video_settings

    checkpoint = model_folder(model)
    if not query.strip():
        raise ValueError("query is empty")
    params = SamplingParams(temperature=0.0, max_completion_length=max_completion_length)
    settings = replace(read_video_settings(Path(checkpoint)), video_backend=video_backend)
    answerer = Answerer(checkpoint, settings, params, base=base)
    known_s = duration_of(video) if answerer.loader.chat.templates else 0.0  # own templates may name it
    sample = Sample(video.stem, video, query, duration_s=known_s, windows=())
    (prompt,) = answerer.loader.prompts([sample], [mode])
    (completion,) = answerer.answer([prompt])
    span, second = answered_span(completion.text, settings.answer_form, require_tags), prompt.video.second_per_grid
    duration_s = prompt.video.grid_thw[0] * second
    return {
        "video": str(video),
        "query": query,
        "span": span,
        "duration_s": round(duration_s, 2),
        "outside_video": is_outside(span, duration_s + second),  # the file may last for up to a patch more
        "text": completion.text,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the answer as one JSON object. Exit code 2 on bad input."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.infer", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="run folder (RUN/best: of its best evaluation), checkpoint folder or hub name"
    )
    parser.add_argument("--base", help="hub name of the model that adapters belong on, where the hub's cache lacks it")
    parser.add_argument("--video", required=True, type=Path)
    parser.add_argument("--query", required=True)
    parser.add_argument("--think", action="store_true", help="reason first")
    parser.add_argument("--untagged", action="store_true", help="read an answer without <answer> tags too")
    parser.add_argument("--max_completion_length", type=int, default=256)
    parser.add_argument("--video_backend", choices=get_args(BackendName), default="auto", help="what decodes the video")
    parser.add_argument("--plot", type=Path, help="write a timeline with frames under it to this PNG")
    options = parser.parse_args(arguments)
    prepare_environment()
    mode: Mode = "think" if options.think else "answer"
    try:
        if options.plot:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
        how = options.max_completion_length, not options.untagged, options.video_backend, options.base
        answer = infer(options.model, options.video, options.query, mode, *how)
        print(json.dumps(answer))
        if options.plot:
            _plot(answer, options.plot)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2
    return 0


def _plot(answer: dict[str, Any], path: Path, num_frames: int = 8) -> None:
    from tempsamp_fast.data.frame_folder import thumbnails
    from tempsamp_fast.report.plots import plot_timeline

    duration_s = answer["duration_s"]
    times_s = [duration_s * (index + 0.5) / num_frames for index in range(num_frames)]
    pictures = thumbnails(answer["video"], times_s, height=96)
    plot_timeline(pictures, times_s, duration_s, {"predicted": answer["span"]}, answer["query"], path)


if __name__ == "__main__":
    sys.exit(main())

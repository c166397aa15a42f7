"""What is asked: annotations, videos and how frames are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tempsamp_fast.config.setting import parse_range, require, require_types, setting
from tempsamp_fast.sample import AnswerForm, Task

MOST_SYNTHETIC = 100_000


@dataclass
class DataConfig:
    """What is asked: annotations, videos and how frames are taken."""

    annotations: str = setting(
        "synthetic", "training file, data set name (charades-train, ...), or 'synthetic': the embedded data set"
    )
    eval_annotations: str | None = setting(None, "held-out file or data set name")
    format: str = setting(
        "auto",
        "format of both annotation files: captions, charades_text, momentseeker, omtg, orarl, plain, qvhighlights, "
        "time_r1, timelens, timelens_100k, timelens_bench, vue_tr; auto tells by suffix and keys",
    )
    videos: str | None = setting(None, "folder of <video id>.mp4, or of another suffix, or of frames")
    eval_videos: str | None = setting(None, "folder of the held-out videos where it is another (out of domain)")
    few_shot_videos: int | None = setting(None, "train on this many videos, drawn at random", unit="videos")
    few_shot_seed: int = setting(0, "seed of the draw of few_shot_videos; smaller subsets lie within larger ones")
    few_shot_queries: Literal["all", "one"] = setting("all", "which queries of each drawn video are kept")
    duration_range: str | None = setting(None, "train on videos of low:high seconds only", unit="s")
    window_range: str | None = setting(None, "train on true spans of low:high seconds only", unit="s")
    difficulty_range: str | None = setting(None, "train on difficulties in low:high only")
    draw: Literal["none", "timelens", "timelens2", "release"] = setting(
        "none",
        "train on draw_samples samples, drawn by the offline IoUs or difficulties in their rows as TimeLens, TimeLens2 "
        "or TempSamp-R1's release draw theirs",
    )
    draw_samples: int | None = setting(
        None, "samples of a draw; smaller draws lie within larger ones but for those by stratum", unit="samples"
    )
    draw_seed: int = setting(0, "seed of the draw of draw_samples")
    draw_like: str | None = setting(
        None, "benchmark file or data set name whose lengths and coverages of spans the release's draw has"
    )
    synthetic_dir: str = setting("data/synthetic", "where the embedded data set is kept")
    synthetic_videos: str = setting("700,20,220", "embedded videos: train,val,test", unit="videos")
    task: Task = setting("grounding", "what is asked of a video: the span of a query, or its highlights with scores")
    answer_form: AnswerForm = setting(
        "text",
        "how spans are asked for, written and read: text (the paper's), json (a list of all spans, TimeLens2), or as "
        "published with TempSamp-R1's release (example), TimeLens (sentence), OraRL (strict), OMTG (time_tags)",
    )
    prompt_file: str | None = setting(
        None, "YAML file with a template of yours for each mode asked in, with {query}, {duration} and {answer_form}"
    )
    max_eval_samples: int | None = setting(None, "evaluate the first N queries only", unit="queries")
    on_bad_sample: Literal["raise", "skip"] = setting(
        "raise",
        "a video that is missing or cannot be read, or a prompt longer than max_tokens_per_row, ends the run (before "
        "it starts where that can be told), or is replaced by the next sample and counted; formerly on_bad_video",
        former_name="on_bad_video",
    )
    max_bad_videos: int | None = setting(
        None,
        "training samples that each process may replace for a bad one, per epoch and anew when resumed; "
        "data/bad_videos in metrics.jsonl has those of each step, of all ranks",
        unit="samples",
    )
    video_backend: Literal["auto", "native", "torchcodec"] = setting(
        "auto", "what reads videos: the C++ extension (native) or torchcodec; auto: native where it is built"
    )
    video_device: Literal["cpu", "cuda", "auto"] = setting(
        "cpu", "what decodes: cuda is the hardware decoders of each rank's GPU"
    )
    sampling: Literal["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"] = setting(
        "pts",
        "which frames are taken: pts by their time stamps; the others as qwen-vl-utils or transformers choose them",
    )
    fps: float = setting(
        2.0, "rate at which frames are taken and shown to the model", unit="frames/s", source="paper: 2"
    )
    min_frames: int = setting(4, "least frames of a video", unit="frames")
    max_frames: int = setting(768, "most frames of a video", unit="frames", source="paper: 768")
    min_pixels: int | None = setting(
        None, "least of a frame; None: the model family's default", unit="pixels", source="paper: 12544"
    )
    max_pixels: int | None = setting(
        None, "most of a frame; None: the model family's default", unit="pixels", source="paper: 602112"
    )
    total_pixels: int | None = setting(
        None,
        "most of a video's frames together; None: the model family's default",
        unit="pixels",
        source="paper: 2809856",
    )
    random_crop: float = setting(0.0, "share of training videos cut to a random stretch around their true spans")
    prefetch_steps: int = setting(2, "steps whose videos are decoded ahead", unit="steps")
    patch_cache: str | None = setting(None, "folder that keeps decoded videos and packet indexes between runs")
    video_cache_gib: float = setting(2.0, "memory for decoded videos, per process", unit="GiB")
    cache_features: bool = setting(
        False, "keep what a frozen vision tower made of a video there and in patch_cache, not its pixels"
    )

    def __post_init__(self) -> None:
        require_types(self)
        require(0 < self.fps < math.inf, "fps", self.fps, "positive")
        require(2 <= self.min_frames <= self.max_frames, "min_frames", self.min_frames, "between 2 and max_frames")
        require(0 <= self.random_crop <= 1, "random_crop", self.random_crop, "in [0, 1]")
        bad = self.max_bad_videos
        require(bad is None or bad >= 0, "max_bad_videos", bad, "zero or more")
        require(self.prefetch_steps >= 1, "prefetch_steps", self.prefetch_steps, "at least 1")
        require(self.video_cache_gib >= 0, "video_cache_gib", self.video_cache_gib, "zero or more")
        for name in ("min_pixels", "max_pixels", "total_pixels"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "positive")
        require(
            self.max_eval_samples is None or self.max_eval_samples >= 0,
            "max_eval_samples", self.max_eval_samples, "zero (no evaluation) or more",
        )  # fmt: skip
        few = self.few_shot_videos
        require(few is None or few >= 1, "few_shot_videos", few, "at least 1")
        number, like = self.draw_samples, self.draw_like
        require((self.draw == "none") == (number is None), "draw_samples", number, "given with draw")
        require((self.draw == "release") == (like is not None), "draw_like", like, "given with draw='release' alone")
        require(number is None or number >= 1, "draw_samples", number, "at least 1")
        for name in ("duration_range", "window_range", "difficulty_range"):
            parse_range(name, getattr(self, name))
        has_test = self.eval_annotations is not None
        require(self.eval_videos is None or has_test, "eval_videos", self.eval_videos, "given with eval_annotations")
        if self.annotations != "synthetic":
            require(self.videos is not None, "videos", self.videos, "given with your own annotations")
            return
        for name in ("videos", "eval_annotations", "eval_videos"):
            value = getattr(self, name)
            require(value is None, name, value, "given with --annotations (without it the embedded data set is used)")

    def num_synthetic_videos(self) -> tuple[int, int, int]:
        """Embedded videos for training, validation and test."""
        try:
            train, val, test = (int(part) for part in self.synthetic_videos.split(","))
            if not 0 <= min(train, val, test) <= max(train, val, test) <= MOST_SYNTHETIC:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"synthetic_videos={self.synthetic_videos!r}: must be train,val,test such as 600,20,300, each at most "
                f"{MOST_SYNTHETIC}"
            ) from None
        return train, val, test

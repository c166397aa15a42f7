"""What is asked: annotations, videos and how frames are taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tempsamp_fast.config.ranges import parse_range, require
from tempsamp_fast.sample import Task


@dataclass
class DataConfig:
    """What is asked: annotations, videos and how frames are taken."""

    annotations: str = field(
        default="synthetic",
        metadata={"help": "training file, data set name (charades-train, ...), or 'synthetic': the embedded data set"},
    )
    eval_annotations: str | None = field(default=None, metadata={"help": "held-out file or data set name"})
    videos: str | None = field(default=None, metadata={"help": "folder of <video id>.{mp4,mkv,webm,avi}"})
    eval_videos: str | None = field(
        default=None, metadata={"help": "folder of the held-out videos where it is another (out of domain)"}
    )
    few_shot_videos: int | None = field(default=None, metadata={"help": "train on this many videos, drawn at random"})
    few_shot_seed: int = field(default=0, metadata={"help": "which ones; smaller subsets lie within larger ones"})
    few_shot_queries: Literal["all", "one"] = field(default="all", metadata={"help": "of each drawn video"})
    duration_range: str | None = field(default=None, metadata={"help": "train on videos of low:high seconds only"})
    window_range: str | None = field(default=None, metadata={"help": "train on true spans of low:high seconds only"})
    difficulty_range: str | None = field(default=None, metadata={"help": "train on difficulties in low:high only"})
    synthetic_dir: str = field(default="data/synthetic", metadata={"help": "where the embedded data set is kept"})
    synthetic_videos: str = field(default="700,20,220", metadata={"help": "embedded videos: train,val,test"})
    task: Task = "grounding"
    max_eval_samples: int | None = field(default=None, metadata={"help": "evaluate the first N queries only"})
    on_bad_video: Literal["raise", "skip"] = "raise"
    max_bad_videos: int | None = field(
        default=None,
        metadata={
            "help": "training samples that each process may replace for a bad video, per epoch and anew when resumed; "
            "data/bad_videos in metrics.jsonl has those of each step, of all ranks"
        },
    )
    video_backend: Literal["auto", "native", "torchcodec"] = "auto"
    video_device: Literal["cpu", "cuda", "auto"] = field(
        default="cpu", metadata={"help": "what decodes: cuda is the hardware decoders of each rank's GPU"}
    )
    sampling: Literal["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"] = "pts"
    fps: float = field(default=2.0, metadata={"help": "frames per second shown to the model"})
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int | None = field(default=None, metadata={"help": "per frame; None: the model family's default"})
    max_pixels: int | None = field(default=None, metadata={"help": "per frame; None: the model family's default"})
    total_pixels: int | None = field(default=None, metadata={"help": "per video; None: the model family's default"})
    random_crop: float = field(
        default=0.0, metadata={"help": "share of training videos cut to a random stretch around their true spans"}
    )
    prefetch_steps: int = field(default=2, metadata={"help": "steps whose videos are decoded ahead"})
    patch_cache: str | None = field(
        default=None, metadata={"help": "folder that keeps decoded videos and packet indexes between runs"}
    )
    video_cache_gib: float = field(default=2.0, metadata={"help": "memory for decoded videos, per process"})
    cache_features: bool = field(
        default=False,
        metadata={"help": "keep what a frozen vision tower made of a video there and in patch_cache, not its pixels"},
    )

    def __post_init__(self) -> None:
        require(0 < self.fps < math.inf, "fps", self.fps, "positive")
        require(1 <= self.min_frames <= self.max_frames, "min_frames", self.min_frames, "between 1 and max_frames")
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
        for name in ("duration_range", "window_range", "difficulty_range"):
            parse_range(name, getattr(self, name))
        has_test = self.eval_annotations is not None
        require(self.eval_videos is None or has_test, "eval_videos", self.eval_videos, "given with eval_annotations")
        if self.annotations != "synthetic":
            require(self.videos is not None, "videos", self.videos, "given with your own annotations")

    def num_synthetic_videos(self) -> tuple[int, int, int]:
        """Embedded videos for training, validation and test."""
        try:
            train, val, test = (int(part) for part in self.synthetic_videos.split(","))
        except ValueError:
            raise ValueError(
                f"synthetic_videos={self.synthetic_videos!r}: must be train,val,test such as 600,20,300"
            ) from None
        return train, val, test

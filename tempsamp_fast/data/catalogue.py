"""Published data sets by name, and the samples that a run trains on and is tested on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tempsamp_fast.config import DataConfig, parse_range
from tempsamp_fast.config.setting import did_you_mean
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.draws import drawn_as_release, drawn_as_timelens, drawn_as_timelens2
from tempsamp_fast.data.subsets import few_shot, shared_videos, within
from tempsamp_fast.rewards import highlight_targets
from tempsamp_fast.sample import Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A published annotation file."""

    files: tuple[str, ...]
    """Names it goes by."""
    num_videos: int | None = None
    """As published; None where no figure is."""
    num_queries: int | None = None


DATASETS = {
    "charades-train": Dataset(("charades_train.json", "charades_sta_train.txt"), 5338, 12408),
    "charades-test": Dataset(("charades_test.json", "charades_sta_test.txt"), 1334, 3720),
    "activitynet-train": Dataset(("activitynet_train.json", "train.json"), 10009, 37421),
    "activitynet-val": Dataset(("activitynet_val_1.json", "val_1.json"), 4917, 17505),
    "activitynet-test": Dataset(("activitynet_val_2.json", "val_2.json"), 4885, 17031),
    "qvhighlights-train": Dataset(("qvhighlights_train.jsonl", "highlight_train_release.jsonl"), None, 7218),
    "qvhighlights-val": Dataset(("qvhighlights_val.jsonl", "highlight_val_release.jsonl"), None, 1550),
    "timelens-100k": Dataset(("timelens-100k.jsonl",), 19466, 96586),
    "timelens-bench-charades": Dataset(("charades-timelens.json",), 1313, 3363),
    "timelens-bench-activitynet": Dataset(("activitynet-timelens.json",), 1455, 4500),
    "timelens-bench-qvhighlights": Dataset(("qvhighlights-timelens.json",), 1511, 1541),
    "timelens2-93k": Dataset(("timelens2-93k.jsonl", "timelens2_93k.jsonl"), 23793, 93232),
    "omtg-bench": Dataset(("OMTGBench.tsv",), 287, 320),
    "vue-tr": Dataset(()),
    "vue-tr-v2": Dataset(()),
    "momentseeker": Dataset(()),
    "ego4d-nlq": Dataset(()),
}
"""QVHighlights publishes no ground truth for its test split."""


def find_annotations(dataset: Dataset, videos: Path) -> Path:
    """The data set's file in `videos` or the folder above it. Raises ValueError when it is in neither."""
    for folder in (videos, videos.parent):
        for name in dataset.files:
            if (folder / name).is_file():
                return folder / name
    names = " or ".join(dataset.files) or "file of a usual name"
    raise ValueError(f"no {names} in {videos} or above it; name the file with --annotations")


def dataset_name(annotations: str) -> str | None:
    """The name in `DATASETS` that `annotations` is, or whose usual file name it has; None for any other file."""
    if annotations in DATASETS:
        return annotations
    return next((name for name, dataset in DATASETS.items() if Path(annotations).name in dataset.files), None)


def load_samples(annotations: str, videos: Path, format: str = "auto", skips_bad: bool = False) -> list[Sample]:
    """The samples of a file, or of a data set by its name in `DATASETS`, found in or above the folder `videos`.

    format, skips_bad: as of `load_annotations`; the format of a data set is known.
    Raises ValueError for a name that is neither, and as `load_annotations` does.
    """
    if annotations in DATASETS:
        return load_annotations(find_annotations(DATASETS[annotations], videos), videos, skips_bad=skips_bad)
    path = Path(annotations)
    if not path.suffix and not path.exists():
        meant = did_you_mean(annotations, DATASETS)
        raise ValueError(f"annotations={annotations!r}: no such file, and no data set of {', '.join(DATASETS)}{meant}")
    return load_annotations(path, videos, format, skips_bad)


def require_clip_scores(annotations: str, samples: Sequence[Sample], asked: str = "--task highlight") -> None:
    """What the task `highlight` learns from and is scored by. Raises ValueError where a sample has none."""
    without = [sample for sample in samples if not sample.clip_scores]
    if without:
        raise ValueError(
            f"{asked}: {annotations} has no clip scores for {len(without)} of {len(samples)} queries, first "
            f"{without[0].sample_id[:80]!r}; it takes QVHighlights annotations"
        )


def _drawn(train: list[Sample], data: DataConfig) -> list[Sample]:
    if data.draw_samples is None:
        return train
    if data.draw == "release":
        assert data.draw_like is not None and data.videos is not None
        like = load_samples(data.draw_like, Path(data.videos))
        return drawn_as_release(train, data.draw_samples, data.draw_seed, like)
    return (drawn_as_timelens if data.draw == "timelens" else drawn_as_timelens2)(
        train, data.draw_samples, data.draw_seed
    )


def load_training_data(data: DataConfig) -> tuple[list[Sample], list[Sample]]:
    """What a run learns from, filtered and few-shot as `data` says, and the held-out samples it is tested on.

    Highlights are not learnt from queries whose clips all have score 0. Raises ValueError when nothing is left to learn
    from, when clip scores are missing for `highlight`, and when an out-of-domain pair (`eval_videos`) shares videos.
    """
    assert data.videos is not None
    skips_bad = data.on_bad_sample == "skip"
    every = load_samples(data.annotations, Path(data.videos), data.format, skips_bad)
    ranges = {
        "duration_s": parse_range("duration_range", data.duration_range),
        "window_s": parse_range("window_range", data.window_range),
        "difficulty": parse_range("difficulty_range", data.difficulty_range),
    }
    if data.task == "highlight":
        require_clip_scores(data.annotations, every)
        every = [sample for sample in every if highlight_targets(sample)]
    train = within(every, **ranges)
    if not train:
        raise ValueError(f"annotations={data.annotations!r}: none of {len(every)} samples lies within {ranges}")
    if data.few_shot_videos is not None:
        train = few_shot(train, data.few_shot_videos, data.few_shot_seed, data.few_shot_queries == "one")
    if data.random_crop and any(sample.reasoning for sample in train):
        raise ValueError(
            f"random_crop={data.random_crop}: must be 0 with reasoning in {data.annotations}: a crop would shift "
            "the times that it names"
        )
    train = _drawn(train, data)
    if len(train) < len(every):
        logger.info("training on %d of %d samples", len(train), len(every))
    if data.eval_annotations is None:
        return train, []
    held_out = load_samples(data.eval_annotations, Path(data.eval_videos or data.videos), data.format, skips_bad)
    if data.task == "highlight":
        require_clip_scores(data.eval_annotations, held_out)
    if shared := shared_videos(train, held_out):
        message = f"{len(shared)} videos are in training and in test: {', '.join(shared[:5])}"
        if data.eval_videos is not None:
            raise ValueError(f"eval_videos={data.eval_videos!r}: {message}")
        logger.warning("%s", message)
    return train, held_out[: data.max_eval_samples]

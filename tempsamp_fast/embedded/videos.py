"""The embedded data set: seeded synthetic videos, encoded for real, with timed events and queries about them.

`generate` writes `videos/<id>.{mp4,mkv,webm}` and `annotations/{train,val,test}.json` in the format of Charades-STA.
Each event is one coloured shape that is visible for a while; no other shape of that colour and form is in the video.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

from tempsamp_fast.embedded.render import CODECS, COLOURS, SHAPES, Actor, Clip, write_video

logger = logging.getLogger(__name__)

GENERATOR_VERSION = 4  # raise it when the same config would give other files than before
SPLITS = ("train", "val", "test")
FRAME_RATES = (Fraction(6), Fraction(8), Fraction(10), Fraction(12), Fraction(15), Fraction(12000, 1001))
KEYFRAME_INTERVALS = (12, 30, 60, 250)
# Codec and whether the frame rate varies, by the video's index modulo the cycle; all others are plain H.264.
ENCODING_CYCLE = 16
UNUSUAL_ENCODINGS = {3: ("h264", True), 6: ("hevc", False), 9: ("vp9", False), 12: ("h264", True)}
PHRASINGS = (
    "a {} appears",
    "the {} is visible",
    "the {} moves across the screen",
    "a {} is moving around.",
    "when does a {} appear",
    "find the moment when the {} shows up",
    "the time during which a {} is on the screen",
    "a {} enters, moves and leaves.",
)


@dataclass(frozen=True)
class SyntheticConfig:
    """What to generate. Raises ValueError, naming the field, for values that make no data set."""

    seed: int = 0
    num_train: int = 700
    num_val: int = 20
    num_test: int = 220
    min_duration_s: float = 8.0
    max_duration_s: float = 40.0
    sizes: tuple[str, ...] = ("96x72", "72x96", "80x80", "112x64", "98x70", "90x66")
    """WIDTHxHEIGHT of the frames in pixels, both even."""
    colours: tuple[str, ...] = ("red", "green", "blue", "yellow")
    shapes: tuple[str, ...] = ("circle", "square")
    max_events: int = 4
    """Each video has 1 to max_events events, drawn uniformly."""
    min_event_share: float = 0.2
    max_event_share: float = 0.45
    """Shortest and longest event as a share of its video."""
    time_step_s: float = 0.5
    """Events start and end at multiples of it: what frames at 2 per second can tell."""
    num_distractors: int = 1
    """Further shapes that no query asks for, half of them visible all the time."""
    noise: float = 8.0
    """Standard deviation of the background noise, in grey levels of 0-255."""
    background: float = 110.0
    """Grey level of the backgrounds. The default lies near the processors' mean, where texture is as loud as a shape to
    an untrained vision tower, since that normalises every patch; at 20 it is a quarter as loud."""

    def __post_init__(self) -> None:
        for name in ("num_train", "num_val", "num_test", "num_distractors", "noise"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.background <= 255:
            raise ValueError(f"background must be a grey level of 0-255, got {self.background}")
        if self.max_events < 1:
            raise ValueError(f"max_events must be at least 1, got {self.max_events}")
        if not 0 < self.min_event_share <= self.max_event_share <= 1:
            raise ValueError(
                "need 0 < min_event_share <= max_event_share <= 1, "
                f"got {self.min_event_share} and {self.max_event_share}"
            )
        if not 0 < self.min_duration_s <= self.max_duration_s:
            raise ValueError(
                f"need 0 < min_duration_s <= max_duration_s, got {self.min_duration_s} and {self.max_duration_s}"
            )
        shortest = self.min_event_share * self.min_duration_s
        if not 0 < self.time_step_s <= shortest:
            raise ValueError(f"need 0 < time_step_s <= {shortest:g}, the shortest event, got {self.time_step_s}")
        for name, known in (("colours", COLOURS), ("shapes", SHAPES)):
            unknown = set(getattr(self, name)) - set(known)
            if unknown:
                raise ValueError(f"{name} has {sorted(unknown)}; choose from {list(known)}")
        if len(self.colours) * len(self.shapes) < self.max_events + self.num_distractors:
            raise ValueError(
                f"{len(self.colours)} colours x {len(self.shapes)} shapes are too few for "
                f"max_events {self.max_events} + num_distractors {self.num_distractors} different ones"
            )
        for size in self.sizes:
            match = re.fullmatch(r"(\d+)x(\d+)", size)
            if not match or any(int(side) < 32 or int(side) % 2 for side in match.groups()):
                raise ValueError(f"sizes must be WIDTHxHEIGHT, both even and at least 32, got {size!r}")

    def digest(self) -> str:
        """Identifies the data set that this config gives."""
        content = json.dumps([GENERATOR_VERSION, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True)
class Video:
    """One planned video: its pixels and its entry in the annotations."""

    video_id: str
    clip: Clip
    annotation: dict
    """{"duration": s, "timestamps": [[start_s, end_s], ...], "sentences": [...]}"""

    @property
    def file_name(self) -> str:
        return self.video_id + self.clip.codec.suffix


def draw_interval(rng: random.Random, config: SyntheticConfig, duration_s: float) -> tuple[float, float]:
    """Start and end in seconds of an event, both rounded down to whole time steps."""
    length = rng.uniform(config.min_event_share, config.max_event_share) * duration_s
    start = rng.uniform(0, duration_s - length)
    whole_steps = lambda time_s: round(math.floor(time_s / config.time_step_s) * config.time_step_s, 6)
    return whole_steps(start), whole_steps(start + length)


def draw_video(config: SyntheticConfig, split: str, index: int) -> Video:
    """Plan a video from the seed, the split and the index alone: a larger data set begins with the smaller one."""
    rng = random.Random(f"{config.seed}/{split}/{index}")
    codec, variable_rate = UNUSUAL_ENCODINGS.get(index % ENCODING_CYCLE, ("h264", False))
    frame_rate = rng.choice(FRAME_RATES)
    fewest_frames = math.ceil(config.min_duration_s * frame_rate)
    num_frames = rng.randint(fewest_frames, max(fewest_frames, math.floor(config.max_duration_s * frame_rate)))
    duration_s = float(num_frames / frame_rate)
    width, height = (int(side) for side in rng.choice(config.sizes).split("x"))

    num_events = rng.randint(1, config.max_events)
    kinds = rng.sample(list(product(config.colours, config.shapes)), config.num_distractors + num_events)
    actors = []
    for order, (colour, shape) in enumerate(kinds):
        always_visible = order < config.num_distractors and order % 2 == 0
        start_s, end_s = (0.0, duration_s) if always_visible else draw_interval(rng, config, duration_s)
        size = round(min(width, height) * rng.uniform(0.27, 0.38))
        position = (rng.uniform(0, 2 * width), rng.uniform(0, 2 * height))
        velocity = (rng.choice((-1, 1)) * rng.uniform(0.1, 0.5) * width, rng.uniform(-0.3, 0.3) * height)
        actors.append(Actor(colour, shape, size, start_s, end_s, position, velocity))

    clip = Clip(
        width=width,
        height=height,
        num_frames=num_frames,
        frame_rate=frame_rate,
        variable_rate=variable_rate,
        codec=CODECS[codec],
        keyframe_interval=rng.choice(KEYFRAME_INTERVALS),
        noise=config.noise,
        background=config.background,
        texture_seed=rng.getrandbits(32),
        actors=tuple(actors),
    )
    events = actors[config.num_distractors :]
    annotation = {
        "duration": round(clip.duration_s, 2),
        "timestamps": [[event.start_s, event.end_s] for event in events],
        "sentences": [rng.choice(PHRASINGS).format(f"{event.colour} {event.shape}") for event in events],
    }
    return Video(f"{split}{index:05d}", clip, annotation)


def draw_videos(config: SyntheticConfig) -> dict[str, list[Video]]:
    """The plan of the whole data set, by split."""
    counts = dict(zip(SPLITS, (config.num_train, config.num_val, config.num_test), strict=True))
    return {split: [draw_video(config, split, index) for index in range(count)] for split, count in counts.items()}


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new one, never a part."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def claim_folder(folder: Path, config: SyntheticConfig) -> None:
    """Make the folder hold this config's data set, or the beginning of it, dropping what another config left there."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        if json.loads(manifest.read_text())["digest"] == config.digest():
            return
        logger.warning("%s holds the data set of another config: replacing it", folder)
        for name in ("videos", "annotations"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is neither empty nor a synthetic data set (it has no manifest.json)")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"digest": config.digest(), "version": GENERATOR_VERSION, "config": dataclasses.asdict(config)}
    replace_text(manifest, json.dumps(content, indent=2) + "\n")


def generate(
    folder: Path,
    config: SyntheticConfig,
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the data set of a config into a folder and return the folder; only what is missing there is made.

    Files appear whole or not at all, the annotations after all the videos, so an interrupted call is completed by the
    next one and concurrent calls with one config are harmless. In a distributed launch let one rank call it, then,
    after a barrier, the others. `num_workers` videos are encoded at a time (default: one per usable core);
    `on_progress(done, total)` is called in this thread after each. Raises ValueError for a folder that holds something
    else, FileNotFoundError without ffmpeg and RuntimeError when ffmpeg fails.
    """
    folder = Path(folder)
    plan = draw_videos(config)
    claim_folder(folder, config)
    for name in ("videos", "annotations"):
        (folder / name).mkdir(exist_ok=True)
    missing = [
        video for videos in plan.values() for video in videos if not (folder / "videos" / video.file_name).exists()
    ]

    with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:

        def make(video: Video) -> None:
            written = Path(unfinished) / video.file_name
            write_video(video.clip, written)
            os.replace(written, folder / "videos" / video.file_name)

        # Threads: the encoder is its own process, and drawing is numpy calls that release the interpreter lock.
        with ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as executor:
            for done, _ in enumerate(executor.map(make, missing), start=1):
                if on_progress:
                    on_progress(done, len(missing))

    for split, videos in plan.items():
        annotations = {video.video_id: video.annotation for video in videos}
        replace_text(folder / "annotations" / f"{split}.json", json.dumps(annotations, indent=1) + "\n")
    logger.info(
        "%s: %d videos made, %d there already", folder, len(missing), sum(map(len, plan.values())) - len(missing)
    )
    return folder


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """One flag for each field of the config, and --out, --num-workers."""
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.embedded.videos", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--num-workers", type=int, help="videos encoded at a time (default: one per usable core)")
    for field in dataclasses.fields(SyntheticConfig):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if isinstance(default, tuple):
            parser.add_argument(flag, nargs="+", default=default, help=f"default: {' '.join(default)}")
        else:
            parser.add_argument(flag, type=type(default), default=default, help="default: %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: generate, with a counter on stderr, and print the folder."""
    args = vars(parse_args(arguments))
    folder, num_workers = args.pop("out"), args.pop("num_workers")
    show = lambda done, total: print(f"\r{done}/{total} videos", end="", file=sys.stderr)
    try:
        generate(folder, SyntheticConfig(**args), num_workers, show)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        sys.exit(str(error))
    print(folder)


if __name__ == "__main__":
    main()

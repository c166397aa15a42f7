"""Draw one synthetic clip with numpy and encode it with the ffmpeg command line."""

import math
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 190, 40),
    "blue": (30, 60, 235),
    "yellow": (245, 225, 20),
    "purple": (185, 30, 215),
    "cyan": (20, 215, 225),
}
SHAPES = ("circle", "square", "triangle")

NOISE_POOL_SIZE = 8
QUIET_X265 = ("-x265-params", "log-level=error:pools=none:frame-threads=1:b-adapt=0")
# Where the frame rate varies, gaps between frames swing by this share of the nominal one, over about so many frames.
SWING_DEPTH, SWING_FRAMES = 0.7, 32


@dataclass(frozen=True)
class Codec:
    """One way to encode."""

    name: str
    """As ffprobe reports it."""
    suffix: str
    """Of the container's file name."""
    encoder: str
    options: tuple[str, ...]


CODECS = {
    codec.name: codec
    for codec in (
        Codec("h264", ".mp4", "libx264", ("-preset", "veryfast", "-crf", "23", "-bf", "3", "-b_strategy", "0")),
        Codec("hevc", ".mkv", "libx265", ("-preset", "ultrafast", "-crf", "24", "-bf", "3", *QUIET_X265)),
        Codec("vp9", ".webm", "libvpx-vp9", ("-deadline", "realtime", "-cpu-used", "8", "-crf", "30", "-b:v", "0")),
    )
}


@dataclass(frozen=True)
class Actor:
    """A coloured shape that bounces between the borders while it is visible, from start_s up to end_s."""

    colour: str
    shape: str
    size: int
    """Height and width in pixels."""
    start_s: float
    end_s: float
    position: tuple[float, float]
    """Left and top in pixels at time 0, before reflection at the borders."""
    velocity: tuple[float, float]
    """Pixels per second, to the right and down."""


@dataclass(frozen=True)
class Clip:
    """Everything that determines the pixels and the file of one video."""

    width: int
    height: int
    num_frames: int
    frame_rate: Fraction
    """Frames per second; the mean rate when `variable_rate` is set."""
    variable_rate: bool
    codec: Codec
    keyframe_interval: int
    """Most frames between two keyframes."""
    noise: float
    """Standard deviation of the background noise, in grey levels of 0-255."""
    background: float
    """Grey level of the background, in 0-255, from which videos deviate by up to 10."""
    texture_seed: int
    actors: tuple[Actor, ...]
    """Later ones are drawn over earlier ones."""

    @property
    def duration_s(self) -> float:
        return float(self.num_frames / self.frame_rate)


def swing(clip: Clip) -> tuple[float, float]:
    """Amplitude and period, in frames, of the sine that delays frames of a variable-rate clip.

    Whole periods fill the clip, so that it lasts as long as at the constant rate.
    """
    period = clip.num_frames / max(1, round(clip.num_frames / SWING_FRAMES))
    return SWING_DEPTH * period / math.tau, period


def frame_times(clip: Clip) -> np.ndarray:
    """Presentation times in seconds, float64 [num_frames], strictly increasing from 0."""
    index = np.arange(clip.num_frames, dtype=np.float64)
    if clip.variable_rate:
        amplitude, period = swing(clip)
        index += amplitude * np.sin(math.tau * index / period)
    return index / float(clip.frame_rate)


def shape_mask(shape: str, size: int) -> np.ndarray:
    """The pixels a shape covers, bool [size, size]."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    if shape == "circle":
        return x**2 + y**2 <= 0.25
    if shape == "triangle":
        return 2 * np.abs(x) <= y + 0.5
    assert shape == "square", shape
    return np.full((size, size), True)


def noisy_backgrounds(clip: Clip) -> np.ndarray:
    """A muted texture under different draws of the noise, uint8 [NOISE_POOL_SIZE, height, width, 3].

    All videos are about equally grey: a model that could tell them apart would learn their answers by heart.
    """
    rng = np.random.default_rng(clip.texture_seed)
    y, x = np.mgrid[: clip.height, : clip.width] / clip.height
    texture = np.zeros((clip.height, clip.width))
    for _ in range(4):
        frequency_y, frequency_x = rng.uniform(-25, 25, size=2)
        texture += rng.uniform(3, 10) * np.sin(frequency_y * y + frequency_x * x + rng.uniform(0, 6.3))
    grey, tint = clip.background + rng.uniform(-10, 10), rng.uniform(-3, 3, size=3)
    noise = rng.normal(0, clip.noise, size=(NOISE_POOL_SIZE, clip.height, clip.width, 3))
    return (grey + tint + texture[..., None] + noise).clip(0, 255).astype(np.uint8)


def reflected(position: np.ndarray, limit: int) -> np.ndarray:
    """Fold straight motion into bouncing between 0 and limit; int64, same shape."""
    return (limit - np.abs(position % (2 * limit) - limit)).astype(np.int64)


def render(clip: Clip) -> np.ndarray:
    """All frames of a clip, RGB uint8 [num_frames, height, width, 3]."""
    backgrounds = noisy_backgrounds(clip)
    rng = np.random.default_rng(clip.texture_seed + 1)
    frames = backgrounds[rng.integers(NOISE_POOL_SIZE, size=clip.num_frames)]
    times = frame_times(clip)
    for actor in clip.actors:
        (visible,) = np.nonzero((times >= actor.start_s) & (times < actor.end_s))
        left, top = (
            reflected(start + speed * times[visible, None], side - actor.size)
            for start, speed, side in zip(actor.position, actor.velocity, (clip.width, clip.height), strict=True)
        )
        rows, columns = np.nonzero(shape_mask(actor.shape, actor.size))
        frames[visible[:, None], top + rows, left + columns] = COLOURS[actor.colour]
    return frames


def find_ffmpeg() -> str:
    """Path of the ffmpeg program. Raises FileNotFoundError, with the command that installs it, where there is none."""
    path = shutil.which("ffmpeg")
    if path is None:
        raise FileNotFoundError("ffmpeg is not on the PATH; install it with: sudo apt-get install -y ffmpeg")
    return path


def write_video(clip: Clip, path: Path) -> None:
    """Render and encode a clip to `path`; the same clip and ffmpeg give the same bytes.

    Raises FileNotFoundError without ffmpeg and RuntimeError, with ffmpeg's own words, when encoding fails.
    """
    command = [find_ffmpeg(), "-y", "-hide_banner", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-video_size", f"{clip.width}x{clip.height}", "-framerate", str(clip.frame_rate), "-i", "pipe:0"]
    if clip.variable_rate:
        amplitude, period = swing(clip)
        shown_at = f"(N+{amplitude}*sin(2*PI*N/{period}))/({clip.frame_rate})/TB"
        command += ["-vf", f"settb=1/1000,setpts='{shown_at}'", "-fps_mode", "vfr", "-enc_time_base", "1:1000"]
    command += ["-c:v", clip.codec.encoder, *clip.codec.options, "-g", str(clip.keyframe_interval)]
    command += ["-pix_fmt", "yuv420p", "-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact", str(path)]
    with tempfile.TemporaryFile() as messages:  # a pipe here would make subprocess feed stdin 512 bytes at a time
        result = subprocess.run(
            command, input=render(clip).reshape(-1).data, stdout=subprocess.DEVNULL, stderr=messages
        )
        messages.seek(0)
        if result.returncode != 0:
            reason = messages.read().decode(errors="replace").strip()
            raise RuntimeError(f"ffmpeg could not write {path} (exit status {result.returncode}): {reason}")

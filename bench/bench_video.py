"""File to patches at 2 frames a second: ours beside torchcodec and decord with the processor's arithmetic in torch.

    pytest bench/bench_video.py

One core: every decoder with one thread, pinned to one core, in CPU seconds of the process. All cores: a batch of 16
files on the clock, each peer at its better setting (files in parallel, or threads inside FFmpeg). Patches are float32,
as the processors of transformers make them.
Each benchmark first checks that ours and torchcodec's are equal bit for bit, then times everybody in turn.
`extra_info`: `ratio` is the best peer's time over ours (median over rounds), with its spread, and `goal`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from tempsamp_fast.video import Geometry, Sampling, load_videos

ROUNDS = 5
GEOMETRY = Geometry()
SAMPLING = Sampling("hf_qwen3", fps=2.0)
CORES = sorted(os.sched_getaffinity(0))
X264 = "-c:v libx264 -preset medium -bf 3"
CLIPS = {
    "h264_360p": ("640x360", X264, 1.8),
    "h264_720p": ("1280x720", X264, 1.7),
    "h264_1080p": ("1920x1080", X264, 1.6),
    "hevc_720p": ("1280x720", "-c:v libx265 -preset medium -x265-params log-level=none", 2.1),
    "vp9_720p": ("1280x720", "-c:v libvpx-vp9 -deadline good -cpu-used 4 -b:v 1500k", 1.2),
    "av1_720p": ("1280x720", "-c:v libsvtav1 -preset 8 -crf 40", 1.2),
}
"""name -> (size, encoder arguments, least ratio on one core)."""
SECONDS = 10
REAL_CLIPS = ["nasa_13013.mp4", "flipping_a_pancake.mkv", "av1_video.mkv", "h265_video.mp4", "bt709_full_range.mp4"]
BATCH = 16

FrameReader = Callable[[Path, Sequence[int], int], Tensor]
"""(path, indices, FFmpeg threads) -> [T, 3, H, W] uint8."""


@pytest.fixture(scope="session")
def clips(pytestconfig: pytest.Config) -> Path:
    """Zooming fractal with film grain: motion and texture everywhere, encoded once and kept in pytest's cache."""
    return pytestconfig.cache.mkdir("video_bench")


def clip(folder: Path, name: str) -> Path:
    size, encoder, _ = CLIPS[name]
    path = folder / f"{name}.mp4"
    if not path.exists():
        source = f"mandelbrot=s={size}:r=25:end_scale=0.02,noise=alls=6:allf=t,format=yuv420p"
        draft = folder / f"draft_{name}.mp4"
        command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-f", "lavfi", "-i", source, "-t", str(SECONDS)]
        subprocess.run([*command, *encoder.split(), draft], check=True)
        draft.rename(path)
    return path


def torchcodec_exact(path: Path, indices: Sequence[int], threads: int) -> Tensor:
    return VideoDecoder(path, num_ffmpeg_threads=threads).get_frames_at(list(indices)).data


def torchcodec_approximate(path: Path, indices: Sequence[int], threads: int) -> Tensor:
    return VideoDecoder(path, num_ffmpeg_threads=threads, seek_mode="approximate").get_frames_at(list(indices)).data


def decord(path: Path, indices: Sequence[int], threads: int) -> Tensor:
    from decord import VideoReader

    frames = VideoReader(str(path), num_threads=threads).get_batch(list(indices)).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


PEERS: dict[str, FrameReader] = {
    "torchcodec_exact": torchcodec_exact,
    "torchcodec_approximate": torchcodec_approximate,
    "decord": decord,
}


def processed(frames: Tensor) -> Tensor:
    """The video processor of transformers without torchvision: resize, rescale and normalise in one, then patches."""
    num_frames, _, height, width = frames.shape
    frames = F.interpolate(frames, GEOMETRY.frame_size(num_frames, height, width), mode="bicubic", antialias=True)
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (GEOMETRY.mean, GEOMETRY.std))
    pixels = (frames.float() - mean).div_(std)
    if num_frames % 2:
        pixels = torch.cat([pixels, pixels[-1:]])
    _, _, height, width = pixels.shape
    blocks = pixels.view(-1, 2, 3, height // 28, 2, 14, width // 28, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(-1, GEOMETRY.row_width)


def ours(paths: Sequence[Path], threads: int) -> Tensor:
    return load_videos(
        [(path, SAMPLING) for path in paths], GEOMETRY, num_threads=threads, backend="native"
    ).pixel_values


def peer(read: FrameReader, paths: Sequence[Path], indices: Sequence[int], at_once: int, threads: int) -> Tensor:
    """All files through one peer, `at_once` of them in parallel, each with `threads` threads inside FFmpeg."""
    if at_once == 1:
        return torch.cat([processed(read(path, indices, threads)) for path in paths])
    with ThreadPoolExecutor(at_once) as pool:
        return torch.cat(list(pool.map(lambda path: processed(read(path, indices, threads)), paths)))


@contextmanager
def pinned(cores: Sequence[int], torch_threads: int) -> Iterator[None]:
    """Run on these cores only."""
    threads = torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(torch_threads)
    try:
        yield
    finally:
        os.sched_setaffinity(0, CORES)
        torch.set_num_threads(threads)


Clock = Callable[[], float]


def seconds(run: Callable[[], object], clock: Clock = time.process_time) -> float:
    start = clock()
    run()
    return clock() - start


def compare(
    benchmark,
    our_run: Callable[[], object],
    peer_runs: dict[str, Callable[[], object]],
    goal: float,
    clock: Clock = time.process_time,
) -> None:
    """Time everybody in turn, round by round; the ratio is against the peer with the best median."""
    times: dict[str, list[float]] = {name: [] for name in ["ours", *peer_runs]}

    def peers_first() -> None:
        for name, run in peer_runs.items():
            times[name].append(seconds(run, clock))

    benchmark.pedantic(lambda: times["ours"].append(seconds(our_run, clock)), setup=peers_first, rounds=ROUNDS)
    best = min(peer_runs, key=lambda name: median(times[name]))
    ratios = [theirs / our for theirs, our in zip(times[best], times["ours"], strict=True)]
    benchmark.extra_info.update(
        ratio=median(ratios),
        spread=[min(ratios), max(ratios)],
        goal=goal,
        best_peer=best,
        median_s={name: median(values) for name, values in times.items()},
    )


def wanted_indices(path: Path) -> list[int]:
    """The frames of `SAMPLING`, and the gate: ours from them are torchcodec's, bit for bit."""
    decoder = VideoDecoder(path)
    total, fps = len(decoder), decoder.metadata.average_fps_from_header
    count = min(max(int(total / fps * 2.0), 4), 768, total)
    indices = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()
    assert torch.equal(ours([path], 1), processed(torchcodec_exact(path, indices, 1)))
    return indices


@pytest.mark.parametrize("name", CLIPS)
def test_one_core(benchmark, clips: Path, name: str) -> None:
    path = clip(clips, name)
    with pinned(CORES[:1], torch_threads=1):
        indices = wanted_indices(path)
        runs = {peer_name: partial(peer, read, [path], indices, 1, 1) for peer_name, read in PEERS.items()}
        if name.startswith("av1"):
            del runs["decord"]  # its FFmpeg has no AV1
        compare(benchmark, lambda: ours([path], 1), runs, goal=CLIPS[name][2])


@pytest.mark.parametrize("name", ["h264_360p", "h264_720p", "hevc_720p"])
def test_all_cores(benchmark, clips: Path, name: str) -> None:
    """A batch of 16 files; `scaling` is ours against itself on one core."""
    paths = [clip(clips, name)] * BATCH
    num_cores = len(CORES)
    with pinned(CORES[:1], torch_threads=1):
        indices = wanted_indices(paths[0])
        alone_s = min(seconds(lambda: ours(paths, 1), time.perf_counter) for _ in range(2))
    with pinned(CORES, torch_threads=1):
        settings = {"by_file": (num_cores, 1), "in_ffmpeg": (1, num_cores)}
        runs = {
            f"{peer_name} {setting}": partial(peer, read, paths, indices, *threads)
            for peer_name, read in PEERS.items()
            for setting, threads in settings.items()
        }
        compare(benchmark, lambda: ours(paths, num_cores), runs, CLIPS[name][2], time.perf_counter)
    together_s = benchmark.extra_info["median_s"]["ours"]
    benchmark.extra_info.update(num_cores=num_cores, scaling=alone_s / together_s, scaling_goal=0.9 * num_cores)


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clip_on_one_core(benchmark, name: str) -> None:
    shared = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    path = shared / "videos" / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set TEMPSAMP_SHARED to the folder with the real clips")
    with pinned(CORES[:1], torch_threads=1):
        indices = wanted_indices(path)
        runs = {peer_name: partial(peer, read, [path], indices, 1, 1) for peer_name, read in PEERS.items()}
        if name.startswith("av1"):
            del runs["decord"]  # its FFmpeg has no AV1
        compare(benchmark, lambda: ours([path], 1), runs, goal=1.2)

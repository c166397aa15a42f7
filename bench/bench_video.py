"""File to patches at 2 frames a second: ours beside torchcodec and decord with the processor's arithmetic in torch.

    pytest bench/bench_video.py                # about 8 minutes; TEMPSAMP_SHARED=FOLDER adds the real clips

One core: every decoder with one thread, pinned to one core, in CPU seconds of the process. All cores: a batch of files
on the clock, each peer at its better setting (files in parallel, or threads inside FFmpeg), which one untimed round
decides. Patches are float32, as the processors of transformers make them.
Each benchmark first checks that ours and torchcodec's are equal bit for bit, then times everybody in turn.
`extra_info`: `ratio` is the best peer's time over ours (median over rounds), with its spread, and `goal`;
`droppable_share` is the part of the frames that no other refers to, which a decoder may leave out.
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

from tempsamp_fast import _video
from tempsamp_fast.video import Geometry, Sampling, load_videos

ROUNDS = 5
ROUNDS_ON_ALL_CORES = 3
GEOMETRY = Geometry()
SAMPLING = Sampling("hf_qwen3", fps=2.0)
CORES = sorted(os.sched_getaffinity(0))
SCENE = "mandelbrot=s={size}:r=25:end_scale=0.1,noise=alls={grain}:allf=t,format=yuv420p"
"""Zooming fractal with film grain: motion and texture everywhere."""
X264 = "-c:v libx264 -preset medium -bf 3"
CLIPS = {
    "h264_360p": ("640x360", 3, X264, 1.8),
    "h264_720p": ("1280x720", 3, X264, 1.7),
    "h264_1080p": ("1920x1080", 3, X264, 1.6),
    "h264_1080p_coarse_grain": ("1920x1080", 6, X264, 1.2),
    "h264_720p_no_b_frames": ("1280x720", 3, "-c:v libx264 -preset medium -bf 0", 1.2),
    "hevc_720p": ("1280x720", 3, "-c:v libx265 -preset medium -x265-params log-level=none", 2.1),
    "vp9_720p": ("1280x720", 3, "-c:v libvpx-vp9 -deadline good -cpu-used 4 -b:v 1500k", 1.2),
    "av1_720p": ("1280x720", 3, "-c:v libsvtav1 -preset 8 -crf 40", 1.2),
}
"""name -> (size, strength of the grain, encoder arguments, least ratio)."""
SECONDS = 8
REAL_CLIPS = ["nasa_13013.mp4", "flipping_a_pancake.mkv", "av1_video.mkv", "h265_video.mp4", "bt709_full_range.mp4"]
BATCHES = {"h264_360p": 16, "h264_720p": 4, "h264_1080p": 2, "hevc_720p": 4, "vp9_720p": 4, "av1_720p": 4}
"""Files in a batch on all cores."""

FrameReader = Callable[[Path, Sequence[int], int], Tensor]
"""(path, indices, FFmpeg threads) -> [T, 3, H, W] uint8."""


@pytest.fixture(scope="session")
def clips(pytestconfig: pytest.Config) -> Path:
    """Clips are encoded once and kept in pytest's cache."""
    return pytestconfig.cache.mkdir("video_bench")


def clip(folder: Path, name: str) -> Path:
    size, grain, encoder, _ = CLIPS[name]
    path = folder / f"{name}_{SECONDS}s.mp4"
    if not path.exists():
        draft = folder / f"draft_{path.name}"
        source = ["-f", "lavfi", "-i", SCENE.format(size=size, grain=grain), "-t", str(SECONDS)]
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-y", *source, *encoder.split(), draft], check=True)
        draft.rename(path)
    return path


def droppable_share(path: Path) -> float:
    """Part of the frames that no other refers to: what a decoder may leave out."""
    ((index, _),) = _video.index([str(path)], [60.0], max_frame_pixels=2**25, max_num_frames=10**6, num_threads=1)
    assert index is not None
    return float(index.packets["droppable"].mean())


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
    threads, before = torch.get_num_threads(), os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(torch_threads)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
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
    rounds: int = ROUNDS,
) -> None:
    """Time everybody in turn, round by round; the ratio is against the peer with the best median."""
    times: dict[str, list[float]] = {name: [] for name in ["ours", *peer_runs]}

    def peers_first() -> None:
        for name, run in peer_runs.items():
            times[name].append(seconds(run, clock))

    benchmark.pedantic(lambda: times["ours"].append(seconds(our_run, clock)), setup=peers_first, rounds=rounds)
    best = min(peer_runs, key=lambda name: median(times[name]))
    ratios = [theirs / our for theirs, our in zip(times[best], times["ours"], strict=True)]
    benchmark.extra_info.update(
        ratio=round(median(ratios), 3),
        spread=[round(min(ratios), 3), round(max(ratios), 3)],
        goal=goal,
        best_peer=best,
        median_s={name: round(median(values), 3) for name, values in times.items()},
    )


def wanted_indices(path: Path) -> list[int]:
    """The frames of `SAMPLING`, and the gate: ours from them are torchcodec's, bit for bit."""
    decoder = VideoDecoder(path)
    total, fps = len(decoder), decoder.metadata.average_fps_from_header
    count = min(max(int(total / fps * 2.0), 4), 768, total)
    indices = torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()
    assert torch.equal(ours([path], 1), processed(torchcodec_exact(path, indices, 1)))
    return indices


def peers_for(path: Path) -> dict[str, FrameReader]:
    """Those that can read the file: decord's FFmpeg has no AV1."""
    return {name: read for name, read in PEERS.items() if not (name == "decord" and path.name.startswith("av1"))}


def one_core(benchmark, path: Path, goal: float) -> None:
    with pinned(CORES[:1], torch_threads=1):
        indices = wanted_indices(path)
        runs = {name: partial(peer, read, [path], indices, 1, 1) for name, read in peers_for(path).items()}
        compare(benchmark, lambda: ours([path], 1), runs, goal)
    benchmark.extra_info["droppable_share"] = round(droppable_share(path), 3)


@pytest.mark.parametrize("name", CLIPS)
def test_one_core(benchmark, clips: Path, name: str) -> None:
    one_core(benchmark, clip(clips, name), CLIPS[name][-1])


@pytest.mark.parametrize("name", BATCHES)
def test_all_cores(benchmark, clips: Path, name: str) -> None:
    """A batch of files; `scaling` is ours against itself on one core."""
    paths = [clip(clips, name)] * BATCHES[name]
    num_cores = len(CORES)
    with pinned(CORES, torch_threads=1):
        indices = wanted_indices(paths[0])
        runs = {}
        for peer_name, read in peers_for(paths[0]).items():
            settings = {
                f"{peer_name} by_file": partial(peer, read, paths, indices, num_cores, 1),
                f"{peer_name} in_ffmpeg": partial(peer, read, paths, indices, 1, num_cores),
            }
            better = min(settings, key=lambda setting: seconds(settings[setting], time.perf_counter))
            runs[better] = settings[better]
        run = partial(ours, paths, num_cores)
        compare(benchmark, run, runs, CLIPS[name][-1], time.perf_counter, ROUNDS_ON_ALL_CORES)
        scalings = []
        for _ in range(ROUNDS_ON_ALL_CORES):
            with pinned(CORES[:1], torch_threads=1):
                alone_s = seconds(partial(ours, paths, 1), time.perf_counter)
            scalings.append(alone_s / seconds(run, time.perf_counter))
    benchmark.extra_info.update(
        num_files=len(paths), scaling=round(median(scalings), 3), scaling_goal=round(0.9 * num_cores, 2)
    )


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL_CLIPS)
def test_real_clip_on_one_core(benchmark, name: str) -> None:
    shared = Path(os.environ.get("TEMPSAMP_SHARED", Path(__file__).parents[2] / "shared" / "data"))
    path = shared / "videos" / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set TEMPSAMP_SHARED to the folder with the real clips")
    one_core(benchmark, path, 1.2)

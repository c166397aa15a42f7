"""Hardware decoding against torchcodec's CUDA decoder; surfaces and uint8 patches to model-ready patches on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from bench.gpu_sections.child import Record
from bench.gpu_sections.timing import in_turn
from tempsamp_fast.video import Geometry, Limits, Sampling, VideoBatch, load_videos, normalise_rows
from tempsamp_fast.video.nv12 import Pictures, write_patches
from tempsamp_fast.video.target import find_target
from tests.video.test_nv12 import coefficients, random_surfaces, write_patches_in_torch

VIDEOS = Path("data/gpu/videos")
"""Clips with H.264, HEVC and VP9 among them; bench/GPU_TODO.md says how to make them."""
COPIES = 4
"""Times that each clip is decoded in one call, so that all engines have work."""
ROUNDS = 5
SIZES = ((360, 640), (720, 1280), (1080, 1920))
NUM_FRAMES = 64


def measure(record: Record) -> None:
    geometry = Geometry.of_family("qwen2_5_vl")
    with record.attempt("hardware decoders"):
        measure_decoders(record, geometry)
    with record.attempt("normalise"):
        measure_normalise(record, geometry)
    for height, width in SIZES:
        with record.attempt(f"surfaces {height}p"):
            measure_surfaces(record, geometry, height, width)


def measure_decoders(record: Record, geometry: Geometry) -> None:
    """Frames per second by codec and number of decoders, after the patches were found equal to the CPU's."""
    target = find_target("cuda")
    if target.decoders is None:
        record.add("hardware decoders", found=f"none: {target.reason}")
        return
    engines = target.decoders.num_engines
    record.add("hardware decoders", engines=engines)
    if not VIDEOS.is_dir():
        record.add("hardware decoders", skipped=f"no folder {VIDEOS}: see bench/GPU_TODO.md")
        return
    record.has("against torchcodec", "torchcodec")
    for codec, paths in paths_by_codec().items():
        with record.attempt(f"decode {codec}"):
            measure_codec(record, geometry, codec, paths, sorted({1, engines, 2 * engines}))


def paths_by_codec() -> dict[str, list[Path]]:
    """Needs the extension. Raises ValueError naming a file that is no video."""
    from tempsamp_fast import _video

    paths = sorted(VIDEOS.iterdir())
    limits = {name: getattr(Limits(), name) for name in ("max_frame_pixels", "max_num_frames")}
    found: dict[str, list[Path]] = {}
    indexes = _video.index([str(path.absolute()) for path in paths], [60.0] * len(paths), num_threads=1, **limits)
    for path, (index, (_, message)) in zip(paths, indexes, strict=True):
        if index is None:
            raise ValueError(f"{path}: {message}")
        found.setdefault(index.codec, []).append(path)
    return found


def measure_codec(record: Record, geometry: Geometry, codec: str, paths: list[Path], counts: list[int]) -> None:
    for name, sampling in {"every frame": Sampling("hf_qwen3", fps=1e6), "2 fps": Sampling(fps=2.0)}.items():
        expected = load(paths, sampling, geometry, "cpu", None)
        ours = load(paths, sampling, geometry, "cuda", None)
        assert torch.equal(ours.pixel_values.cpu(), expected.pixel_values), "bits differ from the CPU path"
        on_gpu = sum(result.backend == "nvdec" for result in ours.results)
        reasons = sorted({result.backend for result in ours.results} - {"nvdec"})
        num_frames = COPIES * sum(result.num_frames for result in ours.results)
        for count in counts:
            runs: dict[str, Callable[[], object]] = {
                "ours": partial(load, paths * COPIES, sampling, geometry, "cuda", count)
            }
            if find_spec("torchcodec"):
                runs["torchcodec"] = partial(frames_by_torchcodec, paths * COPIES, expected, count)
            rates = rates_of(runs, num_frames)
            record.add(f"decode {codec}, {name}, {count} at a time", on_gpu=on_gpu, reasons=reasons, **rates)


def load(paths: list[Path], sampling: Sampling, geometry: Geometry, device: str, num_threads: int | None) -> VideoBatch:
    requests = [(path, sampling) for path in paths]
    return load_videos(requests, geometry, device=device, dtype=torch.uint8, num_threads=num_threads)


def frames_by_torchcodec(paths: list[Path], wanted: VideoBatch, num_threads: int) -> None:
    """The same frames as RGB on the GPU, neither resized nor cut into patches: less than what ours does."""
    from torchcodec.decoders import VideoDecoder

    def decode(path: Path, times_s: torch.Tensor) -> None:
        decoder = VideoDecoder(str(path), device="cuda")
        begin = decoder.metadata.begin_stream_seconds or 0.0
        decoder.get_frames_played_at((times_s + begin + 1e-6).tolist())

    times = [result.frame_times_s for result in wanted.results] * COPIES
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(decode, paths, times))


def rates_of(runs: dict[str, Callable[[], object]], num_frames: int) -> dict[str, object]:
    """Frames per second of each run, taking turns; what fails is named instead."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    figures: dict[str, object] = {}
    for index in range(ROUNDS + 1):
        for name, run in runs.items():
            if f"{name}_error" in figures:
                continue
            torch.cuda.synchronize()
            started = time.perf_counter()
            try:
                run()
            except (RuntimeError, ValueError) as error:
                figures[f"{name}_error"] = str(error).splitlines()[0][:200]
                continue
            torch.cuda.synchronize()
            if index > 0:
                seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        if values:
            figures[f"{name}_frames_per_s"] = num_frames / median(values)
            figures[f"{name}_spread"] = [num_frames / max(values), num_frames / min(values)]
    if "torchcodec" in seconds and all(seconds.values()):
        figures["ratio"] = median(seconds["torchcodec"]) / median(seconds["ours"])
    return figures


def measure_normalise(record: Record, geometry: Geometry) -> None:
    """uint8 rows to bf16, as they come from the decoder threads or the patch cache."""
    rows = torch.randint(0, 256, (2**18, geometry.row_width), dtype=torch.uint8)
    on_gpu = rows.cuda()
    expected = normalise_rows(rows[:4096], geometry, torch.bfloat16)
    assert torch.equal(normalise_rows(on_gpu[:4096], geometry, torch.bfloat16).cpu(), expected)
    target = torch.empty_like(on_gpu)
    runs = {
        "normalise_rows": (partial(normalise_rows, on_gpu, geometry, torch.bfloat16), 3 * rows.numel()),
        "device copy": (partial(target.copy_, on_gpu), 2 * rows.numel()),
    }
    for name, figures in in_turn({name: run for name, (run, _) in runs.items()}).items():
        record.add(f"rows, {name}", **figures, gb_per_s=runs[name][1] / figures["ms"] / 1e6)


def measure_surfaces(record: Record, geometry: Geometry, height: int, width: int) -> None:
    """Random NV12 frames to bf16 patches, bit-equal to the CPU path; bytes are the frames' and the patches'."""
    pictures, frame_size = Pictures(height, width, coefficients()), geometry.frame_size(NUM_FRAMES, height, width)
    surfaces = random_surfaces(NUM_FRAMES, height, width, pitch=-(-width // 256) * 256)
    _, grid_h, grid_w = geometry.grid_thw(2, frame_size)
    expected = torch.empty(grid_h * grid_w, geometry.row_width, dtype=torch.bfloat16)
    write_patches_in_torch(surfaces[:2], pictures, [0, 1], geometry, frame_size, expected)
    num_patches = len(expected) * NUM_FRAMES // geometry.temporal_patch_size
    out = torch.empty(num_patches, geometry.row_width, dtype=torch.bfloat16, device="cuda")
    on_gpu = surfaces.cuda()
    write_patches(on_gpu, pictures, range(NUM_FRAMES), geometry, frame_size, out)
    assert torch.equal(out[: len(expected)].cpu(), expected), "bits differ from the CPU path"
    target = torch.empty_like(on_gpu)
    moved = NUM_FRAMES * height * width * 3 // 2 + 2 * num_patches * geometry.row_width
    convert = partial(write_patches, on_gpu, pictures, range(NUM_FRAMES), geometry, frame_size, out)
    times = in_turn({"patches": convert, "copy": lambda: target.copy_(on_gpu)})
    copy_rate = 2 * on_gpu.numel() / times["copy"]["ms"]
    record.add(
        f"surfaces {height}p to {frame_size[0]}x{frame_size[1]}",
        **times["patches"],
        gb_per_s=moved / times["patches"]["ms"] / 1e6,
        frames_per_s=1e3 * NUM_FRAMES / times["patches"]["ms"],
        share_of_copy_bandwidth=moved / times["patches"]["ms"] / copy_rate,
    )

"""`python -m tempsamp_fast.video probe FILE...` and `python -m tempsamp_fast.video bench FOLDER`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import get_args

import torch

from tempsamp_fast.system.files import log_printably, one_line
from tempsamp_fast.video import Geometry, Sampling, load_videos
from tempsamp_fast.video.backend import why_no_extension
from tempsamp_fast.video.geometry import Processor
from tempsamp_fast.video.probe import probe
from tempsamp_fast.video.sampling import Mode

SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".flv"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 1 when a file failed."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.video", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    probing = commands.add_parser("probe", help="what files are and what sampling they give, one JSON object each")
    probing.add_argument("files", nargs="+", type=Path)
    timing = commands.add_parser("bench", help="file to patches, every backend, one after the other on each file")
    timing.add_argument("folder", type=Path)
    timing.add_argument("--threads", type=int, default=1)
    timing.add_argument("--rounds", type=int, default=3)
    for command in (probing, timing):
        command.add_argument("--mode", choices=get_args(Mode), default="pts")
        command.add_argument("--fps", type=float, default=2.0)
        command.add_argument("--family", choices=get_args(Processor), default="qwen2_5_vl")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    try:
        sampling, geometry = Sampling(options.mode, options.fps), Geometry.of_family(options.family)
        if options.command == "bench" and not options.folder.is_dir():
            raise ValueError(f"{options.folder}: no such folder")
    except ValueError as error:
        parser.exit(2, f"error: {one_line(error)}\n")
    if options.command == "probe":
        reports = [probe(path, sampling, geometry) for path in options.files]
        for report in reports:
            print(json.dumps(report, indent=1))
        return int(any(report["status"] == "failed" for report in reports))
    return bench(options.folder, sampling, geometry, options.threads, options.rounds)


def bench(folder: Path, sampling: Sampling, geometry: Geometry, num_threads: int, rounds: int) -> int:
    """Print the median frames per second of each backend on each video of a folder; 1 when none could be read."""
    backends = ["torchcodec"] if why_no_extension() else ["native", "torchcodec"]
    print("  ".join([f"{'file':40}", f"{'frames':>6}"] + [f"{name + ' frames/s':>20}" for name in backends]))
    num_read = 0
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        seconds: dict[str, list[float]] = {name: [] for name in backends}
        frames: dict[str, int] = {}
        for name in backends * rounds:
            started = time.perf_counter()
            (result,) = load_videos(
                [(path, sampling)],
                geometry,
                backend=name,  # type: ignore[arg-type]
                dtype=torch.bfloat16,
                on_error="partial",
                num_threads=num_threads,
            ).results
            seconds[name].append(time.perf_counter() - started)
            frames[name] = result.num_frames
        rates = [frames[name] / median(seconds[name]) if frames[name] else 0.0 for name in backends]
        num_read += any(frames.values())
        print("  ".join([f"{path.name:40.40}", f"{max(frames.values()):6}"] + [f"{rate:20.1f}" for rate in rates]))
    return int(num_read == 0)


if __name__ == "__main__":
    sys.exit(main())

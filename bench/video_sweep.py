"""Any folder of media against ffmpeg's own decode: is every frame that comes back the one that ffmpeg shows there?

    python -m bench.video_sweep FOLDER... --out bench/results/video_sweep.json

Each file is read by `load_videos` (all frames, or 768 of them spread evenly) and from first to last by the ffmpeg
command line, with a deadline for each. A frame is right when it shows ffmpeg's picture of its place and time, up to
rounding. The verdict on a file:

* `right`: every frame, with status `ok`; also a file that neither can decode, refused;
* `refused`: nothing came back, and the reason says why;
* `partial`: what came back is right, and the status says that there should be more;
* `wrong`: a frame that is not ffmpeg's, or one of ffmpeg's missing under status `ok`;
* `unknown`: ffmpeg did not finish in time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from tempsamp_fast.video import Geometry, Sampling, VideoResult, load_videos
from tempsamp_fast.video.patches import unpatchify
from tempsamp_fast.video.result import printable

GEOMETRY = Geometry(min_pixels=28 * 28, max_pixels=16 * 28 * 28, total_pixels=None)
EVERY_FRAME = Sampling("hf_qwen3", fps=1e6)
FILTER = "bicubic+full_chroma_inp+full_chroma_int+accurate_rnd:param0=0:param1=0.5"
"""Resizing as ours does."""
SAME_TIME_S = 0.006
SAME_PICTURE = 10.0
"""Mean difference in levels that other filters and roundings make at most."""
NEIGHBOURS = 3
"""Frames on either side that must not be a better match."""


@dataclass(frozen=True)
class Row:
    """What became of one file; `frames` is how many ffmpeg decodes."""

    file: str
    verdict: str
    outcome: str
    frames: int
    right: int
    wrong: int
    reason: str


def ffmpeg_frames(
    path: Path, size: tuple[int, int], deadline_s: float, turn: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """All frames in order, [n, height, width, 3] uint8 resized to (height, width) `size`, and times [n] (NaN: none)."""
    height, width = size
    picture = f"format=rgb24,scale={width}:{height}:flags={FILTER},showinfo"
    command: list[str | bytes] = ["ffmpeg", "-nostdin", "-copyts", "-threads", "1"]
    command += [] if turn else ["-noautorotate"]
    command += ["-i", b"file:" + os.fsencode(path), "-an", "-sn", "-vf", picture]
    command += ["-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=deadline_s)
    pictures = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)
    ticks = re.findall(rb"showinfo.* config in time_base: (\d+/\d+)", done.stderr)
    tick_s = Fraction(ticks[0].decode() if ticks else "0")
    stamps = re.findall(rb"showinfo.* n: *\d+ pts: *(\S+)", done.stderr)[: len(pictures)]
    return pictures, np.array([np.nan if stamp == b"NOPTS" else float(int(stamp) * tick_s) for stamp in stamps])


def places_by_index(num_frames: int) -> np.ndarray:
    """Which of `num_frames` frames those of a whole result are: spread evenly by `EVERY_FRAME`, a single one twice."""
    if num_frames == 1:
        return np.zeros(2, dtype=int)
    return np.linspace(0, num_frames - 1, min(num_frames, EVERY_FRAME.max_frames)).round().astype(int)


def places_by_time(result: VideoResult, times_s: np.ndarray) -> np.ndarray:
    """The frame that ffmpeg shows at the time of each of ours, -1 where it shows none then."""
    ours = result.frame_times_s.numpy() + result.begin_s
    if not np.nanmin(np.abs(times_s - ours[0])) < SAME_TIME_S:  # a container without times of presentation
        ours = ours - ours[0] + times_s[0]
    gaps = [np.abs(clock[None] - ours[:, None]) for clock in (times_s, one_clock(times_s))]
    places = [np.where(np.nanmin(gap, axis=1) < SAME_TIME_S, np.nanargmin(gap, axis=1), -1) for gap in gaps]
    return max(places, key=lambda found: (found >= 0).sum())


def one_clock(times_s: np.ndarray) -> np.ndarray:
    """Each part of a joined file follows the one before, a usual step later."""
    steps = np.diff(times_s, prepend=times_s[0])
    usual = np.median(steps) if (steps < 0).any() else 0.0
    return times_s[0] + np.where(steps < 0, usual, steps).cumsum()


def is_same(ours: np.ndarray, theirs: np.ndarray, place: int) -> bool:
    """Whether a picture is ffmpeg's of this place, and not rather one of those around it."""
    if not 0 <= place < len(theirs):
        return False
    around = theirs[max(place - NEIGHBOURS, 0) : place + NEIGHBOURS + 1].astype(np.float32)
    differences = np.abs(around - ours).mean(axis=(1, 2, 3))
    here = differences[min(place, NEIGHBOURS)]
    return bool(here < SAME_PICTURE and here < differences.min() + 0.5)


def sweep_file(path: Path, name: str, deadline_s: float) -> Row:
    """The verdict on one file."""
    batch = load_videos([(path, EVERY_FRAME)], GEOMETRY, dtype=torch.uint8, on_error="partial", deadline_s=deadline_s)
    (result,) = batch.results
    outcome = f"{result.status} {result.code}"
    reason = result.message.removeprefix(f"{printable(result.path)}: ").removesuffix(f" [{result.code}]")
    _, grid_h, grid_w = result.grid_thw if result.status != "failed" else (0, 2, 2)
    size = (grid_h * GEOMETRY.patch_size, grid_w * GEOMETRY.patch_size)
    try:
        theirs, times_s = ffmpeg_frames(path, size, 3 * deadline_s, turn="is not applied" not in result.note)
    except subprocess.TimeoutExpired as late:
        return Row(name, "unknown", outcome, 0, 0, 0, f"ffmpeg takes longer than {late.timeout:.0f} s")
    if result.status == "failed":
        return Row(name, "refused" if len(theirs) else "right", outcome, len(theirs), 0, 0, reason)
    frames = unpatchify(batch.pixel_values, result.grid_thw, GEOMETRY)[: result.num_frames]
    ours = frames.permute(0, 2, 3, 1).numpy().astype(np.float32)
    places = places_by_index(len(theirs))
    is_whole = len(places) == len(ours) and "are left out" not in result.note
    if not is_whole:
        if not len(times_s) or np.isnan(times_s).all():
            return Row(name, "wrong", outcome, len(theirs), 0, len(ours), reason or "another number of frames")
        places = places_by_time(result, times_s)
    same = [is_same(picture, theirs, place) for picture, place in zip(ours, places, strict=True)]
    right, wrong = sum(same), len(same) - sum(same)
    is_told = is_whole or "are left out" in result.note  # of what ffmpeg makes up without a picture to refer to
    reason = reason or ("" if is_whole else result.note) or late_frames(result, times_s, places)
    if wrong or (result.status == "ok" and not is_told):
        verdict = "wrong"
    else:
        verdict = "right" if result.status == "ok" else "partial"
    return Row(name, verdict, outcome, len(theirs), right, wrong, reason)


def late_frames(result: VideoResult, times_s: np.ndarray, places: np.ndarray) -> str:
    """Says how many frames have another time than ffmpeg's, empty for none."""
    if len(times_s) <= places.max(initial=-1):
        return ""
    theirs = one_clock(times_s)[places] - times_s[0]
    late = np.abs(result.frame_times_s.numpy() - theirs) > SAME_TIME_S
    return f"{late.sum()} frames have other times than ffmpeg's" if late.any() else ""


def sweep(folders: Sequence[Path], deadline_s: float) -> list[Row]:
    """Every file under the folders, printed as it is done."""
    rows = []
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = os.fsencode(path.relative_to(folder)).decode(errors="backslashreplace")
            row = sweep_file(path, name, deadline_s)
            rows.append(row)
            print(f"{row.verdict:8} {row.file:44.44} {row.outcome:24} {row.right:4} right {row.wrong:3} wrong "
                  f"of {row.frames:4}  {row.reason}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--deadline_s", type=float, default=20.0, help="for each file; ffmpeg gets three times as long")
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = sweep(arguments.folders, arguments.deadline_s)
    verdicts = dict(sorted(Counter(row.verdict for row in rows).items()))
    if arguments.out:
        lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
        arguments.out.write_text(f'{{"verdicts": {json.dumps(verdicts)}, "files": [\n{lines}\n]}}\n')
    print(f"{len(rows)} files: {verdicts}")


if __name__ == "__main__":
    main()

"""Is a data set complete? `python -m tempsamp_fast.data check FILE_OR_NAME --videos DIR`. Where does one come from?
`python -m tempsamp_fast.data fetch NAME` prints source, licence and commands, and fetches nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tempsamp_fast.config.setting import did_you_mean
from tempsamp_fast.data.annotations import Annotations, read_annotations
from tempsamp_fast.data.catalogue import DATASETS, Dataset, find_annotations
from tempsamp_fast.data.formats import FORMATS
from tempsamp_fast.data.frame_folder import duration_of
from tempsamp_fast.data.loader import LENGTH_TOLERANCE
from tempsamp_fast.data.sources import SOURCES, how_to_fetch
from tempsamp_fast.system.files import escaped, log_printably, one_line
from tempsamp_fast.video import VideoError, frames
from tempsamp_fast.video.probe import header_facts

LENGTH_TOLERANCE_S = 1.0
"""A video may differ from its annotated duration by this or by `LENGTH_TOLERANCE`, the larger of the two."""


@dataclass
class Findings:
    """What `check` found; `problems` by kind, each as one line that names the video."""

    num_videos: int
    num_queries: int
    """Dropped ones included, as in the published counts."""
    num_late_ends: int
    """Windows that end beyond the annotated duration: common in the published files, not a problem."""
    dropped: list[str]
    """Queries left out as `read_annotations` does, a line for each: the published files have some, not a problem."""
    problems: dict[str, list[str]] = field(default_factory=dict)


def check(annotations: Annotations, dataset: Dataset) -> Findings:
    """Look at every sample's video: is it there, do its first and last frame decode, is it as long as annotated?"""
    samples, dropped, untimed = annotations.samples, annotations.dropped, annotations.untimed
    durations_s: dict[Path, set[float]] = {}
    for sample in samples:
        durations_s.setdefault(sample.video, set()).add(sample.duration_s)
    findings = Findings(len(durations_s), len(samples) + len(dropped), annotations.num_late_ends, dropped)
    findings.problems["counts"] = [
        f"{found} {name}, published are {published}"
        for name, found, published in (
            ("videos", findings.num_videos, dataset.num_videos),
            ("queries", findings.num_queries, dataset.num_queries),
        )
        if published not in (None, found)
    ]
    present = [video for video in durations_s if video.is_file() or video.is_dir()]
    findings.problems["missing"] = [str(video) for video in durations_s if video not in set(present)]
    findings.problems["without a duration"] = list(untimed.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lengths = dict(zip(present, pool.map(_length_s, present), strict=True))
    findings.problems["unreadable"] = [str(error) for error in lengths.values() if isinstance(error, VideoError)]
    findings.problems["inconsistent"] = [
        f"{video}: lasts {length:.2f} s, annotated are {annotated_s:.2f} s"
        for video, length in lengths.items()
        if not isinstance(length, VideoError) and video not in untimed
        for annotated_s in sorted(durations_s[video])
        if not _agree(length, annotated_s)
    ]
    return findings


def _length_s(video: Path) -> float | VideoError:
    """What the file shows, in seconds, if its first and last frame decode; else why not."""
    try:
        if video.is_dir():
            return duration_of(video)
        length_s = header_facts(video).duration_s
        frames(video, [0.0, length_s], height=16)
    except VideoError as error:
        return error
    return length_s


def _agree(length_s: float, annotated_s: float) -> bool:
    return abs(length_s - annotated_s) <= max(LENGTH_TOLERANCE_S, LENGTH_TOLERANCE * annotated_s)


def describe(findings: Findings, num_shown: int) -> str:
    """The findings as text, the first `num_shown` of each kind by name."""
    lines = [f"{findings.num_videos} videos, {findings.num_queries} queries"]
    lines.append(f"{findings.num_late_ends} windows end beyond the annotated duration (kept as they are)")
    num_shown = max(0, num_shown)
    for kind, listed in {"dropped": findings.dropped, **findings.problems}.items():
        lines.append(f"{kind}: {len(listed) or ('none' if kind == 'dropped' else 'ok')}")
        lines += [f"  {line}" for line in listed[:num_shown]]
        if len(listed) > num_shown:
            lines.append(f"  and {len(listed) - num_shown} more (--show)")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and print the findings; exits with 1 when there are problems, 2 for bad input."""
    log_printably()
    parser = argparse.ArgumentParser(prog="python -m tempsamp_fast.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="check|fetch", dest="command")
    fetch = commands.add_parser("fetch", help="source, licence and download commands of a published set")
    fetch.add_argument("name", metavar="NAME", help=f"one of {', '.join(SOURCES)}")
    fetch.add_argument("--folder", type=Path, help="to fetch into; default: data/NAME")
    fetch.add_argument("--accept_licence", action="store_true", help="its terms are accepted: show the commands")
    command = commands.add_parser("check", help="what is missing, unreadable or inconsistent")
    command.add_argument("name", metavar="FILE_OR_NAME", help=f"annotation file, or {', '.join(DATASETS)}")
    command.add_argument("--videos", required=True, type=Path, help="folder of the video files")
    command.add_argument(
        "--annotations", type=Path, help="file of a published set; default: its usual name in or above --videos"
    )
    command.add_argument("--format", default="auto", choices=["auto", *FORMATS], help="of the annotation file")
    command.add_argument("--show", type=int, default=10, help="findings of each kind to name; 0: none")
    options = parser.parse_args(arguments)
    if options.command == "fetch":
        try:
            print(how_to_fetch(options.name, options.folder or Path("data") / options.name, options.accept_licence))
        except ValueError as error:
            parser.exit(2, f"error: {one_line(error)}\n")
        return
    dataset = DATASETS.get(options.name)
    try:
        if dataset is None and not Path(options.name).is_file():
            meant = did_you_mean(options.name, DATASETS)
            raise ValueError(f"{options.name!r}: no such file, and no data set of {', '.join(DATASETS)}{meant}")
        if not options.videos.is_dir():
            raise ValueError(f"--videos {options.videos}: no such folder")
        usual = find_annotations(dataset, options.videos) if dataset and not options.annotations else options.name
        findings = check(
            read_annotations(options.annotations or usual, options.videos, options.format), dataset or Dataset(())
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")
    print(escaped(describe(findings, options.show)))
    sys.exit(1 if any(findings.problems.values()) else 0)


if __name__ == "__main__":
    main()

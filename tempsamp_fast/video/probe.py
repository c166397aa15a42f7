"""What a video file is, how its packets lie, and what sampling it gives: for `python -m tempsamp_fast.video probe`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tempsamp_fast.video import Geometry, Limits, Sampling, VideoError, load_videos
from tempsamp_fast.video.backend import why_no_extension


@dataclass(frozen=True)
class FileFacts:
    """A file as its header and packets describe it."""

    container: str
    codec: str
    height: int
    width: int
    num_frames: int
    fps: float
    begin_s: float
    duration_s: float
    num_key_frames: int | None = None
    """None where only torchcodec is there to tell."""
    droppable_share: float | None = None
    """Part of the packets that no other frame needs: decoding skips them where they are not wanted."""
    longest_frame_s: float | None = None
    shortest_frame_s: float | None = None
    trouble: str = ""
    """What went wrong while the packets were read."""


def probe(path: Path, sampling: Sampling, geometry: Geometry) -> dict[str, Any]:
    """Facts, index, the sampling as it was really taken, and warnings, ready to be written as JSON."""
    try:
        facts = header_facts(path) if why_no_extension() else indexed_facts(path)
    except VideoError as error:
        return {"file": str(path), "status": "failed", "code": error.code, "message": str(error)}
    (result,) = load_videos([(path, sampling)], geometry, dtype=torch.uint8, on_error="partial").results
    grid_t, grid_h, grid_w = result.grid_thw
    taken = {
        "mode": sampling.mode,
        "num_frames": result.num_frames,
        "frame_times_s": [round(time, 3) for time in result.frame_times_s.tolist()],
        "grid_thw": list(result.grid_thw),
        "resized_to": [grid_h * geometry.patch_size, grid_w * geometry.patch_size],
        "num_tokens": grid_t * grid_h * grid_w // geometry.merge_size**2,
        "second_per_grid": round(result.second_per_grid, 4),
    }
    return {
        "file": str(path),
        "status": result.status,
        "code": result.code,
        "facts": asdict(facts),
        "sampling": taken,
        "warnings": warnings_of(facts) + ([result.message] if result.message else []),
        "backend": result.backend,
    }


def indexed_facts(path: Path) -> FileFacts:
    """From the packet index of the extension. Raises VideoError."""
    from tempsamp_fast.video.native import frame_times, read_index

    index = read_index(path, 60.0, Limits())
    times, duration_s, begin_s = frame_times(index)
    packets = index.packets
    steps = np.diff(times, append=duration_s)
    height, width = index.size
    return FileFacts(
        container=index.format,
        codec=index.codec,
        height=height,
        width=width,
        num_frames=len(times),
        fps=index.frame_rate,
        begin_s=begin_s,
        duration_s=duration_s,
        num_key_frames=index.num_keys,
        droppable_share=float(packets["droppable"].mean()) if len(packets["droppable"]) else None,
        longest_frame_s=float(steps.max()) if len(steps) else None,
        shortest_frame_s=float(steps.min()) if len(steps) else None,
        trouble=index.trouble,
    )


def header_facts(path: Path) -> FileFacts:
    """From torchcodec, which reads less than the index takes; from that where it does not load. Raises VideoError."""
    try:
        from tempsamp_fast.video.torchcodec_backend import open_decoder
        from tempsamp_fast.video.verified_frames import shown_span
    except ImportError:
        if why_no_extension():
            raise
        return indexed_facts(path)
    metadata = open_decoder(path).metadata
    begin, end = shown_span(metadata)
    return FileFacts(
        container=path.suffix.removeprefix("."),
        codec=metadata.codec or "",
        height=metadata.height or 0,
        width=metadata.width or 0,
        num_frames=metadata.num_frames or 0,
        fps=metadata.average_fps or 0.0,
        begin_s=begin,
        duration_s=end - begin,
    )


def warnings_of(facts: FileFacts) -> list[str]:
    """What a user should know before training on the file."""
    warnings = [facts.trouble] if facts.trouble else []
    if facts.longest_frame_s and facts.shortest_frame_s is not None:
        if facts.longest_frame_s > 2 * max(facts.shortest_frame_s, 1e-3):
            warnings.append("variable frame rate: modes other than pts misplace its frames in time")
        if facts.shortest_frame_s <= 0:
            warnings.append("several frames have the same time")
    if facts.num_key_frames is not None and facts.duration_s > 30 * max(facts.num_key_frames, 1):
        warnings.append("over 30 s between key frames: seeking is slow")
    return warnings

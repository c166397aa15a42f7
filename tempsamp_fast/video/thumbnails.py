"""Small RGB pictures out of a video, for plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast.video.backend import why_no_extension
from tempsamp_fast.video.geometry import Geometry
from tempsamp_fast.video.patches import resize_frames, unpatchify
from tempsamp_fast.video.result import Code, Limits, VideoError
from tempsamp_fast.video.sampling import TOLERANCE_S, frames_on_screen

PIXELS = Geometry(patch_size=1, temporal_patch_size=1, merge_size=1)
"""Every pixel is a patch: pictures of any size."""
DEADLINE_S = 60.0


def frames(path: Path, times_s: Sequence[float], height: int) -> Tensor:
    """See `tempsamp_fast.video.frames`."""
    if height < 1:
        raise ValueError(f"height must be at least 1, got {height}")
    return (from_torchcodec if why_no_extension() else from_native)(path, times_s, height)


def from_native(path: Path, times_s: Sequence[float], height: int) -> Tensor:
    """`frames` by the extension."""
    from tempsamp_fast import _video
    from tempsamp_fast.video import native

    index = native.read_index(path, DEADLINE_S, Limits())
    all_times_s, _, begin_s = native.frame_times(index)
    if len(all_times_s) == 0:
        raise VideoError(path, "TOO_FEW_FRAMES", "has no frames")
    wanted = frames_on_screen(np.asarray(times_s, dtype=np.float64), all_times_s)
    chosen, places = np.unique(wanted, return_inverse=True)
    frame_size = (height, _width(*index.size, height))
    plan = native.Plan(index, chosen, all_times_s[chosen], begin_s, 0.0, frame_size)
    rows = torch.empty(plan.num_patches(PIXELS), PIXELS.row_width, dtype=torch.uint8)
    ((states, (code, reason), _),) = _video.decode(
        [plan.request(rows, PIXELS, DEADLINE_S)], max_frame_pixels=Limits().max_frame_pixels, num_threads=1
    )
    if code != "OK":
        raise VideoError(path, cast(Code, code), reason)
    if (states != native.GOOD).any():
        bad_s = plan.times_s[states != native.GOOD].tolist()
        raise VideoError(path, "DECODE_FAILED", f"the frames at {bad_s} s are damaged or missing")
    return unpatchify(rows, PIXELS.grid_thw(len(chosen), frame_size), PIXELS)[places]


def from_torchcodec(path: Path, times_s: Sequence[float], height: int) -> Tensor:
    """`frames` by torchcodec, which refuses files whose frames it cannot tell apart."""
    from tempsamp_fast.video.loaded_ffmpeg import listening
    from tempsamp_fast.video.torchcodec_backend import check_first_frame, open_decoder
    from tempsamp_fast.video.verified_frames import shown_span

    decoder = open_decoder(path)
    check_first_frame(path, decoder)
    begin, end = shown_span(decoder.metadata)
    times = np.clip(begin + np.asarray(times_s, dtype=np.float64), begin, np.nextafter(end, begin))
    try:
        with listening() as complaints:
            shown = [decoder.get_frame_played_at(float(time)) for time in times]
    except (RuntimeError, IndexError) as error:
        raise VideoError(path, "DECODE_FAILED", f"no frame at {list(times_s)} s ({error})") from error
    if complaints or any(frame.pts_seconds > time for frame, time in zip(shown, times + TOLERANCE_S, strict=True)):
        reason = complaints[0] if complaints else "torchcodec finds later ones"
        raise VideoError(path, "DECODE_FAILED", f"no frame at {list(times_s)} s is sure ({reason})")
    return torch.stack([_scaled(frame.data, height) for frame in shown])


def _scaled(picture: Tensor, height: int) -> Tensor:
    _, full_height, full_width = picture.shape
    return resize_frames(picture[None], (height, _width(full_height, full_width, height)))[0]


def _width(full_height: int, full_width: int, height: int) -> int:
    return max(1, round(full_width * height / full_height))

"""Small RGB pictures out of a video, for plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tempsamp_fast.video.patches import resize_frames
from tempsamp_fast.video.result import VideoError
from tempsamp_fast.video.torchcodec_backend import open_decoder, shown_span


def frames(path: Path, times_s: Sequence[float], height: int) -> Tensor:
    """See `tempsamp_fast.video.frames`."""
    if height < 1:
        raise ValueError(f"height must be at least 1, got {height}")
    decoder = open_decoder(path)
    begin, end = shown_span(decoder.metadata)
    times = np.clip(begin + np.asarray(times_s, dtype=np.float64), begin, np.nextafter(end, begin))
    try:
        pictures = [decoder.get_frame_played_at(float(time)).data for time in times]
    except (RuntimeError, IndexError) as error:
        raise VideoError(path, "DECODE_FAILED", f"no frame at {list(times_s)} s ({error})") from error
    return torch.stack([_scaled(picture, height) for picture in pictures])


def _scaled(picture: Tensor, height: int) -> Tensor:
    width = max(1, round(picture.shape[2] * height / picture.shape[1]))
    return resize_frames(picture[None], (height, width))[0]

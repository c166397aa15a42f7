"""Types of the C++ extension (csrc/bindings.cpp)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

class Index:
    path: bytes
    format: str
    codec: str
    has_times: bool
    has_false_times: bool
    is_truncated: bool
    trouble: str
    read_s: float
    coded_size: tuple[int, int]
    size: tuple[int, int]
    orientation: tuple[bool, bool, bool]
    time_base: tuple[int, int]
    frame_rate: float
    num_keys: int
    num_frames: int
    num_restarts: int
    num_left_out: int
    unapplied_degrees: int
    clock: np.ndarray
    packets: dict[str, np.ndarray]

def index(
    paths: Sequence[str | bytes],
    deadlines_s: Sequence[float],
    *,
    max_frame_pixels: int,
    max_num_frames: int,
    num_threads: int,
    index_folder: str | bytes = "",
) -> list[tuple[Index | None, tuple[str, str]]]: ...
def decode(
    requests: Sequence[Mapping[str, Any]], *, max_frame_pixels: int, num_threads: int, simd: str = ""
) -> list[tuple[np.ndarray, tuple[str, str], dict[str, int]]]: ...
def simd_levels() -> list[str]: ...

class Nvdec:
    num_engines: int

    def __init__(self, ordinal: int, *, libcuda: str = ..., libnvcuvid: str = ...) -> None: ...
    def look(
        self, indexes: Sequence[Index], deadlines_s: Sequence[float], *, max_frame_pixels: int, num_threads: int
    ) -> list[tuple[tuple[str, str], int, tuple[int, int, int, int, int, int]]]: ...
    def decode(
        self, requests: Sequence[Mapping[str, Any]], *, stream: int, max_frame_pixels: int, num_threads: int
    ) -> list[tuple[np.ndarray, tuple[str, str], dict[str, int]]]: ...

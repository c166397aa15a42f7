"""Packets that no wanted frame needs are left out, and the wanted frames' bits stay."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tempsamp_fast.video import Geometry
from tests.video.corpus import ffmpeg

native = pytest.importorskip("tempsamp_fast.video.native", reason="the extension tempsamp_fast._video is not built")
from tempsamp_fast import _video  # noqa: E402

NUM_FRAMES = 48
GEOMETRY = Geometry(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
LIBAOM = ["-c:v", "libaom-av1", "-cpu-used", "8", "-threads", "1"]
CLIPS = {
    "h264": (["-c:v", "libx264", "-preset", "veryfast", "-bf", "3"], "mp4", 0.75),
    "hevc": (["-c:v", "libx265", "-x265-params", "log-level=none:bframes=4:b-adapt=0", "-preset", "fast"], "mp4", 0.7),
    "svtav1": (["-c:v", "libsvtav1", "-preset", "10"], "mp4", 0.5),
    "svtav1_bare": (["-c:v", "libsvtav1", "-preset", "10"], "ivf", 0.5),
    "aom": ([*LIBAOM, "-lag-in-frames", "19"], "mkv", 0.95),
    "aom_error_resilient": ([*LIBAOM, "-error-resilience", "default"], "mp4", 1.0),
    "svtav1_open_gop": (["-c:v", "libsvtav1", "-preset", "10", "-svtav1-params", "irefresh-type=1", "-g", "17"],
                        "mp4", 0.9),
    "aom_screen": ([*LIBAOM, "-usage", "realtime", "-aom-params", "tune-content=screen"], "mp4", 1.0),
    "rav1e": (["-c:v", "librav1e", "-speed", "10"], "mp4", 0.95),
}  # fmt: skip
"""name -> (encoder, container, largest share of the packets that 4 frames may take)."""


@pytest.fixture(scope="module", params=CLIPS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    encoder, container, share = CLIPS[request.param]
    path = tmp_path_factory.mktemp("needed") / f"clip.{container}"
    source = ["-f", "lavfi", "-i", f"mandelbrot=s=160x96:r=24,noise=alls=2:allf=t,trim=end_frame={NUM_FRAMES}"]
    ffmpeg(*source, "-pix_fmt", "yuv420p", *encoder, path)
    return path, share


def frames_of(index: _video.Index, wanted: np.ndarray) -> tuple[Tensor, dict[str, int]]:
    plan = native.Plan(index, wanted, np.zeros(len(wanted)), 0.0, 0.5, (56, 84))
    out = torch.empty(plan.num_patches(GEOMETRY), GEOMETRY.row_width, dtype=torch.uint8)
    ((states, _, counts),) = _video.decode([plan.request(out, GEOMETRY, 30.0)], max_frame_pixels=2**25, num_threads=1)
    assert states.tolist() == [native.GOOD] * len(wanted)
    return out.view(len(wanted) // 2, -1), counts


def test_any_pair_of_frames_has_the_bits_that_it_has_among_all(clip: tuple[Path, float]) -> None:
    path, share = clip
    ((index, _),) = _video.index([str(path)], [30.0], max_frame_pixels=2**25, max_num_frames=1000, num_threads=1)
    assert index is not None
    everything, counts = frames_of(index, np.arange(NUM_FRAMES))
    assert counts["decoded"] == len(index.packets["pts"]) and counts["dropped"] == 0
    random = np.random.default_rng(0)
    for num_pairs in (1, 2, 2, 2, 8):
        pairs = np.sort(random.choice(NUM_FRAMES // 2, num_pairs, replace=False))
        some, counts = frames_of(index, np.stack([2 * pairs, 2 * pairs + 1], axis=1).ravel())
        assert torch.equal(some, everything[torch.from_numpy(pairs)])
        if num_pairs == 2:
            assert counts["decoded"] <= share * NUM_FRAMES


def av1_object(kind: int, bits: str) -> bytes:
    """An open bitstream unit with its size."""
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes([kind << 3 | 2, len(payload)]) + payload


def frame(bits: str) -> bytes:
    return av1_object(3, bits.ljust(16 * 8, "0"))


def test_a_key_frame_that_is_shown_later_starts_anew(tmp_path: Path) -> None:
    """Headers by hand: the encoders at hand write no such stream."""
    sequence = av1_object(
        1,
        "000" "0" "0" "0" "0" "00000" + "0" * 12 + "00100"  # one operating point, level 4
        "0111" "0111" "10011111" "01011111" "0"  # 160 x 96, no frame identifiers
        "000" "0000" "0" "0" "0" "0"  # no order hint, no screen content tools
        "000" "00000" "0" "00000000000".ljust(24, "0")
    )  # fmt: skip
    shown_key = frame("000100")
    hidden_key = frame("0000100000000100")  # into place 2
    inter = frame("001100000000001000" + "000" * 6 + "010")  # from 0 and 2 into 3
    units = [sequence + shown_key, inter, hidden_key + inter, frame("1011"), frame("1010")]
    data = b"DKIF" + struct.pack("<HH4sHHIIIxxxx", 0, 32, b"AV01", 160, 96, 24, 1, len(units))
    for i, unit in enumerate(units):
        data += struct.pack("<IQ", len(unit) + 2, i) + b"\x12\x00" + unit
    (tmp_path / "keys.ivf").write_bytes(data)
    ((index, (_, message)),) = _video.index(
        [str(tmp_path / "keys.ivf")], [30.0], max_frame_pixels=2**25, max_num_frames=1000, num_threads=1
    )
    assert index is not None, message
    assert index.packets["writes"].tolist() == [255, 0b1000, 0b1100, 0, 255]
    assert index.packets["reads"].tolist() == [0, 0b101, 0b001, 0b1000, 0b100]

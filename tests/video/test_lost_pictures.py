"""No picture of a whole stream counts as lost, whatever its encoder does with numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.video.corpus import ffmpeg

pytest.importorskip("tempsamp_fast.video.native", reason="the extension tempsamp_fast._video is not built")
from tempsamp_fast import _video

X264 = {
    "no_b_frames": "bframes=0",
    "b_frames": "bframes=3",
    "deep": "bframes=16:b-adapt=0:b-pyramid=normal:keyint=60",
    "strict_pyramid": "bframes=7:b-adapt=0:b-pyramid=strict",
    "open_gop": "open-gop=1:keyint=15:min-keyint=15:bframes=3",
    "one_key": "keyint=infinite:bframes=3",
    "many_keys": "keyint=5:min-keyint=5:bframes=3",
    "intra_refresh": "intra-refresh=1:keyint=20:bframes=0",
    "slices": "slices=4:bframes=3",
    "fields": "interlaced=1:bframes=3",
    "one_reference": "ref=1:bframes=2",
}
ENCODERS = {name: ["-c:v", "libx264", "-preset", "veryfast", "-x264-params", more] for name, more in X264.items()}
ENCODERS["variable_rate"] = ["-vf", "select=not(mod(n\\,3))+gt(n\\,60)", "-fps_mode", "vfr", *ENCODERS["b_frames"]]


def cuts(path: Path) -> int:
    ((index, _),) = _video.index([str(path)], [30.0], max_frame_pixels=2**25, max_num_frames=1000, num_threads=1)
    assert index is not None and not index.has_times
    return int(index.packets["cut"].sum())


@pytest.mark.parametrize("container", ["h264", "avi"])
@pytest.mark.parametrize("name", ENCODERS)
def test_whole_streams_have_no_losses(name: str, container: str, tmp_path: Path) -> None:
    clip = tmp_path / f"clip.{container}"
    source = ["-f", "lavfi", "-i", "testsrc2=s=128x96:r=25,trim=end_frame=150", "-pix_fmt", "yuv420p"]
    ffmpeg(*source, *ENCODERS[name], "-threads", "1", clip)
    if container == "avi" and name in ("no_b_frames", "intra_refresh"):
        pytest.skip("has time stamps")
    assert cuts(clip) == 0


def test_whole_streams_of_fields_have_no_losses(corpus: Path) -> None:
    assert cuts(corpus / "h264_fields.h264") == 0


def test_streams_that_were_cut_and_joined_between_keys_have_no_losses(tmp_path: Path) -> None:
    source = ["-f", "lavfi", "-i", "testsrc2=s=128x96:r=25,trim=end_frame=150", "-pix_fmt", "yuv420p"]
    ffmpeg(*source, *ENCODERS["b_frames"], "-g", "40", tmp_path / "whole.mp4")
    ffmpeg("-ss", "2", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "end.h264")
    ffmpeg("-t", "3.3", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "begin.h264")
    joined = (tmp_path / "end.h264").read_bytes() + (tmp_path / "begin.h264").read_bytes()
    (tmp_path / "joined.h264").write_bytes(joined)
    assert cuts(tmp_path / "end.h264") == cuts(tmp_path / "joined.h264") == 0

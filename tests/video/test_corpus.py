"""The frame that comes back is the frame that was asked for, or a status says that it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.video.backend import why_no_extension
from tests.video.corpus import CASES, Case, draw, read
from tests.video.user_files import PARTS, USER_CASES
from tests.video.verdict import judge

TORCHCODEC_REFUSES = {
    "sound_with_cover.mp4": "takes the cover for the video",
    "h264.ts": "seeks past the first frame of MPEG-TS",
    "h264_zero_start.ts": "as above",
    "h264_clock_wraps.ts": "as above",
    "h264_no_first_key.ts": "as above",
    "h264_open_gop.ts": "as above",
    "hevc.ts": "as above",
    "truncated.ts": "as above",
    "lost_packets.ts": "as above",
    "h264.avi": "takes decoding for presentation times in AVI",
    "mpeg4_b_frames.avi": "as above",
    "edit_list_mid_gop.mp4": "loses the first frames after a cut inside a GOP",
    "h264.h264": "cannot seek in raw streams",
    "h264_fields.h264": "as above",
    "hevc.hevc": "as above",
    "half.h264": "as above",
    "size_change.h264": "as above",
    "lost_frame.h264": "as above",
    "lost_picture.h264": "as above",
    "lost_reference.h264": "as above",
    "lost_frame.avi": "takes decoding for presentation times in AVI",
    "lost_frame_mpeg4.avi": "as above",
    "lost_chunk.avi": "as above",
    "lost_chunk_mpeg4.avi": "as above",
}
"""Good files that the torchcodec backend turns away, and why."""

TORCHCODEC_PARTS = {
    "mpeg2.mpg": "loses the last frame of MPEG-PS",
    "h264_fields.mp4": "counts fields for frames",
    "h264_fields.ts": "as above",
}
"""Good files of which the torchcodec backend returns a part, with a reason."""

TORCHCODEC_MISSES = {
    "lost_slice_hevc.mp4": "FFmpeg makes the slice up without a word",
    "lost_last_slice_hevc.mp4": "as above",
}
"""Damaged files of which the torchcodec backend returns a frame that is not whole."""


def ids(case: Case) -> str:
    return case.name


EVERY_CASE = pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in USER_CASES)], ids=ids
)


@pytest.mark.skipif(bool(why_no_extension()), reason=why_no_extension())
@EVERY_CASE
def test_native_returns_the_frame_asked_for(case: Case, corpus: Path) -> None:
    verdict = judge(case, corpus, "native")
    assert verdict.good, verdict


@EVERY_CASE
def test_torchcodec_backend_returns_the_frame_asked_for_or_says_that_it_does_not(case: Case, corpus: Path) -> None:
    verdict = judge(case, corpus, "torchcodec")
    if case.name in TORCHCODEC_MISSES and verdict.wrong == 1:
        pytest.xfail(TORCHCODEC_MISSES[case.name])
    assert not verdict.wrong and (verdict.good or not verdict.outcome.startswith("ok")), verdict
    # Other releases of torchcodec may read the excepted ones right.
    is_excepted = case.name in TORCHCODEC_REFUSES | TORCHCODEC_PARTS or case.expect == "damaged" or case in USER_CASES
    assert verdict.good or is_excepted, verdict


def test_every_number_survives_drawing_and_reading() -> None:
    numbers = np.arange(1 << 10)
    for width, height in ((280, 56), (281, 57), (16, 16)):
        assert read(draw(numbers, width, height)) == numbers.tolist()


def test_names_of_the_corpus_are_unique() -> None:
    cases = CASES + USER_CASES
    assert len({case.name for case in cases} | set(PARTS)) == len(cases) + len(PARTS)

"""What FFmpeg says while torchcodec decodes is heard, on the thread where it is said and nowhere else."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchcodec import Frame, FrameBatch

from tempsamp_fast.video import Sampling, VideoError, load_videos
from tempsamp_fast.video.loaded_ffmpeg import ERROR_LEVEL, INFO_LEVEL, _ffmpeg, listening
from tempsamp_fast.video.torchcodec_backend import open_decoder
from tempsamp_fast.video.verified_frames import Wanted, by_seeking, in_order
from tests.video.corpus import cut, overwritten
from tests.video.verdict import EVERY_FRAME, GEOMETRY, numbers_shown


def decode(path: Path) -> None:
    decoder = open_decoder(path)
    decoder.get_frames_in_range(0, len(decoder))


def test_a_damaged_picture_is_heard_of_and_a_whole_one_is_not(corpus: Path) -> None:
    for name, is_damaged in {"zeroed.mkv": True, "h264.mkv": False, "zeroed.mkv ": True}.items():
        with listening() as complaints:
            decode(corpus / name.strip())
        assert bool(complaints) == is_damaged and all("%" not in said and said for said in complaints)


@pytest.mark.parametrize(
    ("level", "said", "is_heard"),
    [
        (ERROR_LEVEL, b"a hole", True),
        (ERROR_LEVEL + 8, b"a remark", False),
        (INFO_LEVEL, b"a remark", False),
        (INFO_LEVEL, b"concealing 40 DC errors", True),
        (INFO_LEVEL + 8, b"concealing 40 DC errors", False),
    ],
)
def test_errors_and_made_up_pictures_are_complaints_and_remarks_not(level: int, said: bytes, is_heard: bool) -> None:
    with listening() as complaints:
        _ffmpeg().av_log(None, level, said)
    assert complaints == ([said.decode()] if is_heard else [])


def test_threads_and_blocks_hear_only_their_own(corpus: Path) -> None:
    heard: dict[str, list[str]] = {}

    def run(name: str) -> None:
        with listening() as complaints:
            decode(corpus / name)
        heard[name] = complaints

    threads = [threading.Thread(target=run, args=[name]) for name in ("zeroed.mkv", "h264.mkv")]
    with listening() as outer:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with listening() as inner:
            decode(corpus / "zeroed.mkv")
    assert heard["zeroed.mkv"] and inner and not heard["h264.mkv"] and not outer


def test_what_another_thread_decodes_is_not_heard(corpus: Path) -> None:
    """Though it does not listen itself."""
    with listening() as complaints:
        thread = threading.Thread(target=decode, args=[corpus / "zeroed.mkv"])
        thread.start()
        thread.join()
    assert not complaints


@pytest.mark.parametrize("name", ["all_keys.avi", "mpeg2.mpg"])
def test_where_a_seek_gives_a_doubt_the_file_is_decoded_in_order(name: str, corpus: Path) -> None:
    for sampling, least in ((EVERY_FRAME, 149), (Sampling("pts", fps=2.0), 10)):
        request = [(corpus / name, sampling)]
        batch = load_videos(request, GEOMETRY, backend="torchcodec", dtype=torch.uint8, on_error="partial")
        step = 1 if sampling is EVERY_FRAME else 12.5
        shown = numbers_shown(batch.pixel_values, batch.results[0])
        assert all(abs(number - place * step) < 1 for place, number in enumerate(shown)) and len(shown) >= least


def test_nothing_behind_the_first_damage_is_good(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "h264.mp4").write_bytes((corpus / "h264.mp4").read_bytes())
    damaged = tmp_path / "damaged.mp4"
    size = damaged.with_name("h264.mp4").stat().st_size
    cut("h264.mp4", overwritten(size // 2))(damaged)
    request = [(damaged, EVERY_FRAME)]
    batch = load_videos(request, GEOMETRY, backend="torchcodec", dtype=torch.uint8, on_error="partial")
    (result,) = batch.results
    shown = numbers_shown(batch.pixel_values, result)
    assert result.status == "partial" and shown == list(range(len(shown))) and 20 < len(shown) < 110


SIZE = (28, 28)
CLIP = Path("clip.mkv")


def decoder_of(times_s: list[float]) -> Any:
    """A decoder double: its frames have these times, in an even clip of 25 a second by its header."""
    picture = torch.zeros(3, *SIZE, dtype=torch.uint8)
    frames = [Frame(picture, time_s, 0.04) for time_s in times_s]
    durations_s = torch.full([len(frames)], 0.04)
    batch = FrameBatch(torch.stack([picture] * len(frames)), torch.tensor(times_s, dtype=torch.float64), durations_s)
    metadata = SimpleNamespace(
        codec="h264",
        num_frames=len(frames),
        average_fps_from_header=25.0,
        begin_stream_seconds=0.0,
        end_stream_seconds=len(frames) / 25,
    )
    return SimpleNamespace(metadata=metadata, get_frame_at=lambda at: frames[at], get_frames_played_at=lambda _: batch)


@pytest.mark.parametrize(("shown_s", "is_sure"), [([0.0, 0.48, 1.0], True), ([0.0, 0.52, 1.0], False)])
def test_a_seek_that_lands_on_a_later_frame_gives_a_doubt(shown_s: list[float], is_sure: bool) -> None:
    wanted = Wanted(decoder_of(shown_s), np.array([0.0, 0.5, 1.0]), 0.5, by_time=True)
    found = by_seeking(wanted, SIZE, math.inf)
    assert (found is not None and found.times_s == shown_s) == is_sure


def test_a_clock_that_goes_back_is_refused() -> None:
    wanted = Wanted(decoder_of([0.0, 0.04, 0.08, 0.0, 0.04]), np.arange(5), 0.04, by_time=False)
    with pytest.raises(VideoError, match="its clock goes back at frame 3") as caught:
        in_order(CLIP, wanted, SIZE, math.inf, [])
    assert caught.value.code == "UNSUPPORTED"


def test_the_last_frames_before_a_hole_are_in_doubt() -> None:
    """A demuxer sees it when it reads on; without one all frames are good."""
    times_s = [number / 25 for number in range(10)]
    wanted = Wanted(decoder_of(times_s), np.arange(10), 0.04, by_time=False)
    assert in_order(CLIP, wanted, SIZE, math.inf, []).times_s == times_s
    found = in_order(CLIP, wanted, SIZE, math.inf, ["a hole"])
    assert found.times_s == times_s[:7] and len(found.frames) == 7 and found.missing == "a hole"


def test_a_complaint_while_seeking_gives_a_doubt() -> None:
    decoder = decoder_of([0.0, 0.48, 1.0])
    played = decoder.get_frames_played_at

    def complaining(times_s: torch.Tensor) -> FrameBatch:
        _ffmpeg().av_log(None, ERROR_LEVEL, b"a hole")
        return played(times_s)

    decoder.get_frames_played_at = complaining
    assert by_seeking(Wanted(decoder, np.array([0.0, 0.5, 1.0]), 0.5, by_time=True), SIZE, math.inf) is None

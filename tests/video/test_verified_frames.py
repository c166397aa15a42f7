"""What FFmpeg says while torchcodec decodes is heard, on the thread where it is said and nowhere else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from tempsamp_fast.video import Sampling, load_videos
from tempsamp_fast.video.loaded_ffmpeg import listening
from tempsamp_fast.video.torchcodec_backend import open_decoder
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

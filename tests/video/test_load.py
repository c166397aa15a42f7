"""`load_videos`: shapes, times, statuses and errors, with the torchcodec backend."""

from __future__ import annotations

import importlib
import logging
import math
import sys
import threading
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from torchcodec.decoders import VideoDecoder

import tempsamp_fast
from tempsamp_fast import video
from tempsamp_fast.video import (
    Geometry,
    Limits,
    Sampling,
    VideoError,
    load_videos,
    normalise_rows,
    target,
    thumbnails,
    torchcodec_backend,
)
from tempsamp_fast.video.backend import why_no_extension
from tempsamp_fast.video.patches import patchify, resize_frames
from tempsamp_fast.video.probe import probe
from tests.video.corpus import read
from tests.video.verdict import GEOMETRY, numbers_shown

HALF_SECONDS = [round(index * 12.5 - 1e-9) for index in range(12)]
"""Numbers on screen every half second at 25 frames a second."""


def test_a_torchcodec_that_does_not_fit_torch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.delitem(sys.modules, "tempsamp_fast.video.torchcodec_backend")
    with pytest.raises(ImportError, match=r"torchcodec does not load beside torch \d.*0\.13 for torch 2\.11"):
        importlib.import_module("tempsamp_fast.video.torchcodec_backend")


def test_rows_are_the_frames_of_torchcodec_resized_and_patchified(corpus: Path) -> None:
    geometry = Geometry.of_family("qwen3_vl")
    sampling = Sampling("hf_qwen3", fps=2.0)
    batch = load_videos([(corpus / "hevc.mp4", sampling)], geometry, backend="torchcodec")
    frames = (
        VideoDecoder(str(corpus / "hevc.mp4")).get_frames_at(torch.linspace(0, 149, 12).round().int().tolist()).data
    )
    rows = patchify(resize_frames(frames, geometry.frame_size(12, 56, 280)), geometry)
    assert torch.equal(batch.pixel_values, normalise_rows(rows, geometry))
    assert batch.video_grid_thw.tolist() == [list(geometry.grid_thw(12, geometry.frame_size(12, 56, 280)))]


def test_batch_is_packed_in_order_and_split_again(corpus: Path) -> None:
    names = ["h264.mp4", "missing.mp4", "vp9_odd.webm", "rotated_90.mp4"]
    requests = [(corpus / name, Sampling()) for name in names]
    batch = load_videos(requests, GEOMETRY, backend="torchcodec", dtype=torch.uint8, on_error="skip", num_threads=2)
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.video_grid_thw.shape == (3, 3) and batch.second_per_grid.tolist() == [1.0, 1.0, 1.0]
    assert batch.video_grid_thw.prod(dim=1).sum() == len(batch.pixel_values)
    parts = batch.split()
    assert [part is None for part in parts] == [False, True, False, False]
    for part, result in zip(parts, batch.results, strict=True):
        if part is not None:
            assert numbers_shown(part.pixel_values, result) == HALF_SECONDS
            assert part.grid_thw == result.grid_thw
            assert part.timestamps_s.tolist() == pytest.approx([0.24 + i if i else 0.24 for i in range(6)])


def test_times_are_those_of_the_frames_since_the_first(corpus: Path) -> None:
    result = load_videos([(corpus / "starts_late.mkv", Sampling())], GEOMETRY, backend="torchcodec").results[0]
    assert result.begin_s == pytest.approx(8.33)
    assert result.frame_times_s.tolist() == pytest.approx([number / 25 for number in HALF_SECONDS])


def test_window_takes_its_part_of_the_video(corpus: Path) -> None:
    sampling = Sampling(start_s=2.0, end_s=4.0)
    batch = load_videos([(corpus / "h264.mp4", sampling)], GEOMETRY, backend="torchcodec", dtype=torch.uint8)
    assert numbers_shown(batch.pixel_values, batch.results[0]) == [50, 62, 75, 87]


@pytest.mark.parametrize("mode", ["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"])
def test_seconds_per_grid_is_two_over_the_sampled_rate(mode: str, corpus: Path) -> None:
    result = load_videos([(corpus / "h264.mp4", Sampling(mode, fps=1.0))], GEOMETRY, backend="torchcodec").results[0]  # type: ignore[arg-type]
    assert result.num_frames == 6
    assert result.second_per_grid == pytest.approx(2 * 6.0 / 6)


def test_dtypes_differ_only_in_rounding(corpus: Path) -> None:
    def rows(dtype: torch.dtype) -> torch.Tensor:
        requests = [(corpus / "h264.mp4", Sampling())]
        return load_videos(requests, GEOMETRY, backend="torchcodec", dtype=dtype).pixel_values

    exact = rows(torch.float32)
    assert torch.equal(rows(torch.bfloat16), exact.to(torch.bfloat16))
    assert torch.equal(normalise_rows(rows(torch.uint8), GEOMETRY), exact)


@pytest.mark.parametrize(
    "name, code",
    [("missing.mp4", "NOT_FOUND"), ("prose.mp4", "OPEN_FAILED"), ("thin.mkv", "BAD_GEOMETRY")],
)
def test_first_failure_raises_and_names_the_file(name: str, code: str, corpus: Path) -> None:
    with pytest.raises(VideoError, match=name) as caught:
        load_videos([(corpus / name, Sampling())], GEOMETRY, backend="torchcodec")
    assert caught.value.code == code and caught.value.path == corpus / name
    assert isinstance(caught.value, ValueError)


def test_skip_logs_and_keeps_the_rest(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    requests = [(corpus / "prose.mp4", Sampling()), (corpus / "truncated.mp4", Sampling())]
    with caplog.at_level(logging.WARNING):
        batch = load_videos(requests, GEOMETRY, backend="torchcodec", on_error="skip")
    assert [result.status for result in batch.results] == ["failed", "failed"]
    assert batch.pixel_values.shape == (0, GEOMETRY.row_width) and batch.video_grid_thw.shape == (0, 3)
    assert "prose.mp4" in caplog.text and "truncated.mp4" in caplog.text


def test_partial_keeps_the_good_frames(corpus: Path) -> None:
    requests = [(corpus / "truncated.mp4", Sampling())]
    batch = load_videos(requests, GEOMETRY, backend="torchcodec", on_error="partial", dtype=torch.uint8)
    (result,) = batch.results
    assert (result.status, result.code) == ("partial", "TRUNCATED") and "of 6.00 s" in result.message
    assert numbers_shown(batch.pixel_values, result) == HALF_SECONDS[:4]


def test_limits_and_deadline_have_their_own_codes(corpus: Path) -> None:
    request = [(corpus / "h264.mp4", Sampling())]
    for limits in (
        Limits(max_frame_pixels=99),
        Limits(max_num_frames=9),
        Limits(max_patch_bytes=9),
    ):
        with pytest.raises(VideoError, match="max_"):
            load_videos(request, GEOMETRY, backend="torchcodec", limits=limits)
    with pytest.raises(VideoError) as caught:
        load_videos(request, GEOMETRY, backend="torchcodec", deadline_s=1e-9)
    assert caught.value.code == "DEADLINE"


def test_the_deadline_holds_while_torchcodec_is_busy(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a file whose frames are slow to decode: the call ends while torchcodec is still at it."""
    may_end, has_ended = threading.Event(), threading.Event()

    def fetch(*_: object) -> None:
        may_end.wait(60)
        has_ended.set()

    monkeypatch.setattr(torchcodec_backend.Wanted, "fetch", fetch)
    with pytest.raises(VideoError, match=r"h264.mp4.*deadline") as caught:
        load_videos([(corpus / "h264.mp4", Sampling())], GEOMETRY, backend="torchcodec", deadline_s=0.3)
    assert caught.value.code == "DEADLINE" and not has_ended.is_set()
    may_end.set()


@pytest.mark.parametrize(
    "argument",
    [
        {"backend": "opencv"},
        {"on_error": "ignore"},
        {"dtype": torch.float16},
        {"num_threads": 0},
        {"deadline_s": math.nan},
    ],
)
def test_arguments_out_of_their_choices_are_named(argument: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(argument))):
        load_videos([], GEOMETRY, **argument)


@pytest.fixture
def unloadable_extension(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An extension whose file is there, as after an upgrade of FFmpeg or Python, and is no library."""
    (tmp_path / f"_video{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    monkeypatch.setattr(tempsamp_fast, "__path__", [str(tmp_path), *tempsamp_fast.__path__])
    for name in ("tempsamp_fast._video", "tempsamp_fast.video.native"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for cached in (why_no_extension, video.load_function):
        cached.cache_clear()
    yield
    for cached in (why_no_extension, video.load_function):
        cached.cache_clear()


@pytest.mark.usefixtures("unloadable_extension")
def test_an_extension_that_does_not_load_is_as_good_as_none(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = [(corpus / "h264.mp4", Sampling())]
    with caplog.at_level(logging.INFO, "tempsamp_fast.video"):
        assert [load_videos(request, GEOMETRY).results[0].backend for _ in range(2)] == ["torchcodec"] * 2
    assert caplog.text.count("_video does not load") == 1
    with pytest.raises(ValueError, match=r"native.*does not load.*'torchcodec'"):
        load_videos(request, GEOMETRY, backend="native")
    assert probe(corpus / "h264.mp4", Sampling(), GEOMETRY)["backend"] == "torchcodec"
    assert "does not load" in target._open(torch.device("cuda", 0)).reason


def test_a_gpu_is_the_one_of_its_number_and_without_one_the_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(target, "_with_cuda", lambda device: device)
    found = [target.find_target(name) for name in ("cuda", "auto", "cuda:0", "cuda:3")]
    assert found == [torch.device("cuda", number) for number in (2, 2, 0, 3)]


def test_no_requests_give_an_empty_batch() -> None:
    batch = load_videos([], GEOMETRY, backend="torchcodec")
    assert batch.pixel_values.shape == (0, GEOMETRY.row_width) and batch.split() == []


@pytest.mark.parametrize("backend", ["auto", "torchcodec"])
def test_forked_workers_of_a_data_loader_give_the_same_bits(corpus: Path, backend: video.BackendName) -> None:
    """Also when the process that they are forked from has decoded before, with threads of its own."""
    paths = [corpus / name for name in ("h264.mp4", "hevc.mp4", "vp9_odd.webm", "rotated_90.mp4")]

    def rows(path: Path, num_threads: int = 1) -> torch.Tensor:
        request = [(path, Sampling())]
        return load_videos(request, GEOMETRY, backend=backend, num_threads=num_threads).pixel_values

    expected = [rows(path, num_threads=2) for path in paths]
    workers = DataLoader(
        paths,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=2,
        collate_fn=rows,
        multiprocessing_context="fork",
        timeout=60,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(workers, expected, strict=True))


@pytest.mark.parametrize("name", ["h264.mp4", "h264.ts", "h264.avi", "mpeg2.mpg"])
def test_thumbnails_show_the_frames_on_screen(corpus: Path, name: str) -> None:
    pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
    pictures = video.frames(corpus / name, [0.0, 4.0, 2.01, 99.0], height=28)
    assert pictures.shape == (4, 3, 28, 140)
    assert read(pictures.numpy()) == [0, 100, 50, 149]


def test_thumbnails_are_the_same_with_and_without_the_extension(corpus: Path) -> None:
    pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
    wanted = (corpus / "rotated_90.mp4", [0.5, 3.3], 31)
    assert torch.equal(thumbnails.from_native(*wanted), thumbnails.from_torchcodec(*wanted))


@pytest.mark.parametrize("name", ["h264.ts", "h264.avi"])
@pytest.mark.usefixtures("unloadable_extension")
def test_thumbnails_that_torchcodec_would_get_wrong_are_refused(corpus: Path, name: str) -> None:
    with pytest.raises(VideoError, match=name) as caught:
        video.frames(corpus / name, [2.0], height=28)
    assert caught.value.code == "UNSUPPORTED"


def test_thumbnails_of_what_is_missing_are_refused(corpus: Path) -> None:
    assert read(video.frames(corpus / "truncated.mp4", [1.0], height=28).numpy()) == [25]
    with pytest.raises(VideoError, match=r"truncated\.mp4") as caught:
        video.frames(corpus / "truncated.mp4", [1.0, 5.9], height=28)
    assert caught.value.code == "DECODE_FAILED"


@pytest.mark.shared
def test_real_clips_load(real_videos: Path) -> None:
    """Whole clips are `ok` with the frames that two a second give; the damaged one says so."""
    expected = {"nasa_13013.mp4": ("ok", 26), "video_90.mov": ("ok", 2), "corrupted.mp4": ("partial", 5)}
    requests = [(real_videos / name, Sampling()) for name in expected]
    batch = load_videos(requests, Geometry(), backend="torchcodec", on_error="partial", dtype=torch.uint8)
    assert [(result.status, result.num_frames) for result in batch.results] == list(expected.values())
    assert batch.results[1].grid_thw == (1, 40, 22)

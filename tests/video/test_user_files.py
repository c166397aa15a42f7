"""Names, sizes, messages and notes: what a user learns of a file that is not as it should be."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tempsamp_fast.video import BackendName, Geometry, Sampling, VideoError, VideoResult, load_videos
from tempsamp_fast.video.backend import why_no_extension
from tests.video.corpus import HEIGHT, MADE_FROM_H264, WIDTH, cut
from tests.video.user_files import FEW, NEXT, replaced, turned
from tests.video.verdict import EVERY_FRAME, GEOMETRY, numbers_shown, truth

native_only = pytest.mark.skipif(bool(why_no_extension()), reason=why_no_extension())
BACKENDS = [pytest.param("native", marks=native_only), "torchcodec"]


def load(path: str | Path, backend: BackendName = "native") -> VideoResult:
    return load_videos([(path, Sampling())], GEOMETRY, backend=backend, dtype=torch.uint8, on_error="skip").results[0]


@native_only
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("encrypted.mp4", "is encrypted"),
        ("encrypted_hevc.mp4", "is encrypted"),
        ("unknown_codec.mp4", "no decoder for its codec, vvz1"),
        ("script.mp4", "files of the format concat are not read"),
    ],
)
def test_a_refusal_names_its_cause(name: str, reason: str, corpus: Path) -> None:
    assert reason in load(corpus / name).message


@native_only
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("one_frame.gif", "single frame: it is repeated"),
        ("joined.mkv", "clock starts again 1 times"),
        ("joined_back.ts", "clock starts again 1 times"),
        ("joined.ogv", "clock starts again 1 times"),
        ("no_first_key.mkv", "frames are left out"),
        ("h264_no_first_key.ts", "frames are left out"),
        ("h264_open_gop.mp4", ""),
        ("sound_laced_ebml.mkv", ""),
        ("h264_clock_wraps.ts", ""),
        ("segments_h264.ts", ""),
        ("hour_gap.mp4", ""),
    ],
)
def test_a_good_file_with_a_peculiarity_is_noted(name: str, note: str, corpus: Path) -> None:
    result = load(corpus / name)
    assert result.status == "ok" and (note in result.note if note else not result.note)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_animated_webp_is_right_or_refused_by_name(backend: BackendName, corpus: Path) -> None:
    """Some releases of FFmpeg read it."""
    request = [(corpus / "pictures.webp", EVERY_FRAME)]
    batch = load_videos(request, GEOMETRY, backend=backend, dtype=torch.uint8, on_error="skip")
    (result,) = batch.results
    is_right = result.status == "ok" and numbers_shown(batch.pixel_values, result) == list(range(FEW))
    assert is_right or (result.code == "OPEN_FAILED" and "webp" in result.message)


@native_only
@pytest.mark.parametrize("degrees", [30.0, -135.0])
def test_a_rotation_that_is_no_quarter_turn_is_noted_and_not_applied(
    degrees: float, corpus: Path, tmp_path: Path
) -> None:
    for name in (MADE_FROM_H264, "turned.mp4"):
        (tmp_path / name).write_bytes((corpus / MADE_FROM_H264).read_bytes())
    cut(MADE_FROM_H264, turned(degrees))(tmp_path / "turned.mp4")
    result = load(tmp_path / "turned.mp4")
    assert result.status == "ok" and "degrees is not applied" in result.note and f"{abs(degrees):.0f}" in result.note


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_frame_is_repeated_in_every_mode(backend: BackendName, corpus: Path) -> None:
    for mode in ("pts", "qwen_utils", "hf_qwen2", "hf_qwen3"):
        request = [(corpus / "one_frame.mp4", Sampling(mode, fps=2.0))]  # type: ignore[arg-type]
        batch = load_videos(request, GEOMETRY, backend=backend, dtype=torch.uint8)
        (result,) = batch.results
        assert numbers_shown(batch.pixel_values, result) == [0, 0] and "repeated" in result.note
        assert result.second_per_grid == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_after_a_single_frame_has_none(backend: BackendName, corpus: Path) -> None:
    with pytest.raises(VideoError, match="one_frame") as caught:
        load_videos([(corpus / "one_frame.mp4", Sampling(start_s=3.0))], GEOMETRY, backend=backend)
    assert caught.value.code == "TOO_FEW_FRAMES"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_name_that_is_no_text_costs_at_most_its_own_result(
    backend: BackendName, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/clip\xff\xfe.mp4"))
    strange.write_bytes((corpus / MADE_FROM_H264).read_bytes())
    absent = Path(os.fsdecode(b"/absent\xff.mp4"))
    requests = [(path, Sampling()) for path in (strange, absent, f"{corpus}/h264.mp4\0", corpus / MADE_FROM_H264)]
    with caplog.at_level(logging.WARNING):
        batch = load_videos(requests, GEOMETRY, backend=backend, on_error="skip")
    first, *others = batch.results
    assert first.code == ("OK" if backend == "native" else "OPEN_FAILED")
    assert [result.code for result in others] == ["NOT_FOUND", "NOT_FOUND", "OK"]
    assert all(result.message.isprintable() for result in batch.results[:2]) and r"\xff" in caplog.text


@native_only
def test_an_index_of_a_name_that_is_no_text_is_kept(corpus: Path, tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/clip\xff.mp4"))
    strange.write_bytes((corpus / MADE_FROM_H264).read_bytes())
    folder = tmp_path / os.fsdecode(b"kept\xff")
    folder.mkdir()
    for _ in range(2):
        batch = load_videos([(strange, Sampling())], GEOMETRY, backend="native", index_folder=folder)
        assert batch.results[0].status == "ok" and len(list(folder.iterdir())) == 1


@native_only
@pytest.mark.parametrize("name", ["zeros.h264", "zeros.m4v", "zeros.mjpeg", "picture_and_zeros.h264"])
def test_a_stream_of_gigabytes_without_a_picture_costs_little(name: str, corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((corpus / "h264.h264").read_bytes()[:20_000] if name.startswith("picture") else b"\0")
    os.truncate(path, 3 * 2**30)

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        result = load_videos([(path, Sampling())], Geometry(), backend="native", on_error="skip").results[0]
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        is_told = "holds no picture" in result.message and result.status == "failed"
        os._exit(0 if is_told and grown_kib < 160 * 1024 and time.process_time() - started < 5.0 else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@native_only
@pytest.mark.parametrize("name", ["packed.mp4", "false_times.mp4", "false_times.mkv", "false_times_mpeg2.mkv"])
def test_times_in_the_order_of_decoding_do_not_shuffle_the_frames(name: str, corpus: Path) -> None:
    """The pictures' own order is kept, whatever is sampled."""
    for sampling in (EVERY_FRAME, Sampling("hf_qwen3", fps=3.0), Sampling("hf_qwen3", fps=0.7)):
        batch = load_videos([(corpus / name, sampling)], GEOMETRY, backend="native", dtype=torch.uint8)
        numbers = numbers_shown(batch.pixel_values, batch.results[0])
        _, all_numbers = truth(corpus / name, (WIDTH, HEIGHT))
        wanted = np.linspace(0, len(all_numbers) - 1, len(numbers)).round().astype(int)
        assert numbers == [all_numbers[place] for place in wanted]


@native_only
def test_a_missing_mark_of_keys_is_no_reason_to_start_anywhere(corpus: Path) -> None:
    """The mark is on every packet; the keys that are used are those whose bits say so."""
    from tempsamp_fast.video import Limits
    from tempsamp_fast.video.native import read_index

    for name, most in {"all_keys.avi": 7, "all_keys.asf": 7, "all_keys_mpeg4.mkv": 7, "all_keys_vp9.mp4": 5}.items():
        assert 1 <= read_index(corpus / name, 10.0, Limits()).num_keys <= most, name


@native_only
def test_a_joined_file_whose_headers_the_decoder_does_not_take_is_told(corpus: Path) -> None:
    request = [(corpus / "joined_sizes.ogv", EVERY_FRAME)]
    batch = load_videos(request, GEOMETRY, backend="native", dtype=torch.uint8, on_error="partial")
    (result,) = batch.results
    shown = numbers_shown(batch.pixel_values, result)
    assert shown[:NEXT] == list(range(NEXT)) and (result.status == "partial" or shown[NEXT:] == shown[:NEXT])


def test_surgery_needs_what_it_replaces(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        replaced(b"stss", b"free")(bytearray(b"no such box"))

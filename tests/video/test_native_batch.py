"""The extension as a whole call: threads, deadlines, cancellation, limits, kept indexes, forks, nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tempsamp_fast.video import Geometry, Limits, Sampling, VideoBatch, VideoError, load_videos
from tests.video.corpus import H264, ffmpeg, joined
from tests.video.verdict import EVERY_FRAME, GEOMETRY

pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
from tempsamp_fast import _video

NAMES = ["h264.mp4", "hevc_open_gop.mkv", "vp9.webm", "h264_open_gop.ts", "mpeg4_b_frames.avi", "h264_pyramid.mp4"]


def load(paths: list[Path], sampling: Sampling = EVERY_FRAME, **options: object) -> VideoBatch:
    settings: dict = {"backend": "native", "dtype": torch.uint8, "on_error": "partial", "num_threads": 1, **options}
    return load_videos([(path, sampling) for path in paths], GEOMETRY, **settings)


def read_index(path: Path, **options: object) -> tuple[_video.Index | None, tuple[str, str]]:
    settings: dict = {"max_frame_pixels": 2**25, "max_num_frames": 10**6, "num_threads": 1, **options}
    return _video.index([str(path)], [10.0], **settings)[0]


@pytest.fixture(scope="module")
def slow_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes three seconds to decode: intra frames of noise at a high rate."""
    folder = tmp_path_factory.mktemp("slow")
    noise = ["-f", "lavfi", "-i", "nullsrc=s=1280x720:r=25:d=0.2,geq=random(1)*255:128:128"]
    ffmpeg(*noise, "-c:v", "libx264", "-preset", "ultrafast", "-qp", "4", "-pix_fmt", "yuv420p", folder / "noise.mp4")
    ffmpeg("-stream_loop", "24", "-i", folder / "noise.mp4", "-c", "copy", folder / "slow.mp4")
    return folder / "slow.mp4"


@pytest.mark.parametrize("num_threads", [2, 5])
@pytest.mark.parametrize("sampling", [EVERY_FRAME, Sampling(fps=2.0)])
def test_any_number_of_threads_gives_the_same_patches(corpus: Path, sampling: Sampling, num_threads: int) -> None:
    paths = [corpus / name for name in NAMES]
    alone = [load([path], sampling).pixel_values for path in paths]
    together = load(paths, sampling, num_threads=num_threads)
    assert torch.equal(together.pixel_values, torch.cat(alone))
    assert torch.equal(load(paths[:1], sampling, num_threads=num_threads).pixel_values, alone[0])


def test_frames_far_apart_are_reached_by_seeking_not_by_decoding_all(corpus: Path) -> None:
    index, _ = read_index(corpus / "h264_open_gop.mp4")
    assert index is not None
    out = torch.empty(4 * 20, Geometry().row_width, dtype=torch.uint8)
    geometry = {"height": 56, "width": 280, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    request = {"index": index, "frames": [20, 21], "deadline_s": 10.0, **geometry, "mean": [0.0] * 3, "std": [1.0] * 3,
               "dtype": "uint8", "out": out.data_ptr(), "out_bytes": out[:80].nbytes}  # fmt: skip
    ((states, _, counts),) = _video.decode([request], max_frame_pixels=2**25, num_threads=1)
    assert states.tolist() == [1, 1] and counts["decoded"] < 40 and counts["back_offs"] == 0


@pytest.mark.parametrize("deadline_s", [1e-6, 0.15])
def test_a_deadline_ends_the_call_and_names_itself(slow_clip: Path, deadline_s: float) -> None:
    """Little of the clip is decoded, by processor time: a busy machine changes nothing."""
    started_s = time.process_time()
    (result,) = load([slow_clip], Sampling("hf_qwen3", fps=25.0), deadline_s=deadline_s, on_error="skip").results
    assert result.code == "DEADLINE" and str(slow_clip) in result.message
    assert time.process_time() - started_s < 1.0


def test_a_deadline_leaves_other_videos_of_the_batch_alone(slow_clip: Path, corpus: Path) -> None:
    # Decoding the one takes thrice the deadline, the other a hundredth of it: a busy machine changes neither verdict.
    batch = load([slow_clip, corpus / "h264_16x16.mp4"], Sampling("hf_qwen3", fps=25.0), deadline_s=1.0)
    assert batch.results[0].code == "DEADLINE" and batch.results[1].status == "ok"


def test_reading_the_index_counts_for_the_deadline(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is for decoding."""
    asked: list[dict] = []
    decode = _video.decode

    def noting(requests: list[dict], **options: int) -> list:
        asked.extend(requests)
        return decode(requests, **options)

    monkeypatch.setattr(_video, "decode", noting)
    load([corpus / "h264.mp4"], deadline_s=10.0)
    (request,) = asked
    assert request["deadline_s"] == 10.0 - request["index"].read_s < 10.0


def test_an_exception_from_a_signal_handler_cancels_the_call(slow_clip: Path) -> None:
    """Of a minute of decoding, less than three seconds are done."""

    class Alarm(Exception):
        """Raised by the handler."""

    def handler(*_: object) -> None:
        raise Alarm

    before, started_s = signal.signal(signal.SIGALRM, handler), time.process_time()
    try:
        with pytest.raises(Alarm):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            load([slow_clip] * 20, Sampling("hf_qwen3", fps=25.0), num_threads=2)
        assert time.process_time() - started_s < 3.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_a_stream_that_grows_past_the_limit_is_not_decoded(corpus: Path, tmp_path: Path) -> None:
    for name in ("half.h264", "h264.h264"):
        (tmp_path / name).symlink_to(corpus / name)
    joined("half.h264", "h264.h264")(tmp_path / "grows.h264")
    (result,) = load([tmp_path / "grows.h264"], limits=Limits(max_frame_pixels=144 * 32)).results
    # The decoder may still hold a few frames back when it meets the larger ones.
    assert result.status == "partial" and 140 < result.num_frames <= 150


def test_the_good_frames_of_a_damaged_video_are_kept_only_where_asked_for(corpus: Path) -> None:
    path = corpus / "truncated.mp4"
    (kept,) = load([path]).results
    assert kept.status == "partial" and kept.num_frames > 2
    left_out = load([path], on_error="skip")
    assert (left_out.results[0].status, left_out.results[0].code) == ("failed", kept.code)
    assert len(left_out.pixel_values) == 0
    with pytest.raises(VideoError, match=r"truncated\.mp4: \d+ of \d+ wanted frames are good"):
        load([path], on_error="raise")


def test_more_frames_than_the_limit_are_refused(corpus: Path) -> None:
    (result,) = load([corpus / "h264.mp4"], limits=Limits(max_num_frames=149)).results
    assert (result.status, result.code) == ("failed", "LIMIT_EXCEEDED")


def test_more_bytes_of_patches_than_the_limit_are_refused(corpus: Path) -> None:
    num_bytes = load([corpus / "h264.mp4"]).pixel_values.nbytes
    for most, code in ((num_bytes, "OK"), (num_bytes - 1, "LIMIT_EXCEEDED")):
        (result,) = load([corpus / "h264.mp4"], limits=Limits(max_patch_bytes=most)).results
        assert result.code == code


@pytest.mark.parametrize("name", [*NAMES, "joined.ts", "packed.mp4", "one_frame.gif"])
def test_a_kept_index_is_the_index(corpus: Path, name: str, tmp_path: Path) -> None:
    fresh, _ = read_index(corpus / name)
    read_index(corpus / name, index_folder=str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    kept, _ = read_index(corpus / name, index_folder=str(tmp_path))
    assert fresh is not None and kept is not None
    assert all(np.array_equal(column, kept.packets[key]) for key, column in fresh.packets.items())
    for field in (
        "path",
        "format",
        "codec",
        "size",
        "coded_size",
        "time_base",
        "frame_rate",
        "has_times",
        "num_keys",
        "num_restarts",
        "num_left_out",
    ):
        assert getattr(fresh, field) == getattr(kept, field)
    assert np.array_equal(fresh.clock, kept.clock)


def test_a_kept_index_is_not_used_once_the_file_changes_or_the_copy_is_damaged(corpus: Path, tmp_path: Path) -> None:
    clip, folder = tmp_path / "clip.mp4", tmp_path / "kept"
    folder.mkdir()
    clip.write_bytes((corpus / "h264.mp4").read_bytes())
    read_index(clip, index_folder=str(folder))
    (kept,) = folder.iterdir()
    for damage in (
        lambda data: data[:-20],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda _: b"",
    ):
        kept.write_bytes(damage(kept.read_bytes()))
        index, _ = read_index(clip, index_folder=str(folder))
        assert index is not None and len(index.packets["pts"]) == 150
    clip.write_bytes((corpus / "hevc.mp4").read_bytes())
    index, _ = read_index(clip, index_folder=str(folder))
    assert index is not None and index.codec == "hevc"


def test_load_videos_keeps_indexes_where_it_is_told(corpus: Path, tmp_path: Path) -> None:
    first, second = (load([corpus / "hevc.mp4"], index_folder=tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(first.pixel_values, second.pixel_values)


def test_a_folder_that_cannot_be_written_only_costs_the_keeping(corpus: Path) -> None:
    index, _ = read_index(corpus / "h264.mp4", index_folder="/proc/nowhere")
    assert index is not None


def test_a_forked_process_decodes(corpus: Path) -> None:
    expected = load([corpus / "h264.mp4"], num_threads=2).pixel_values.float().mean().item()

    def child() -> None:
        torch.set_num_threads(1)  # as a worker of a DataLoader: OpenMP's pool does not outlive a fork
        os._exit(0 if load([corpus / "h264.mp4"], num_threads=2).pixel_values.float().mean().item() == expected else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("frames", [0, 999]), ("frames", [-1, 0]), ("out_bytes", 17), ("height", 57), ("width", 0), ("dtype", "int8")],
)
def test_a_request_that_would_write_out_of_bounds_is_refused(corpus: Path, field: str, value: object) -> None:
    index, _ = read_index(corpus / "h264.mp4")
    out = torch.empty(80, Geometry().row_width, dtype=torch.uint8)
    request = {"index": index, "frames": [0, 1], "deadline_s": 10.0, "height": 56, "width": 280, "patch_size": 14,
               "temporal_patch_size": 2, "merge_size": 2, "mean": [0.0] * 3, "std": [1.0] * 3, "dtype": "uint8",
               "out": out.data_ptr(), "out_bytes": out.nbytes, field: value}  # fmt: skip
    with pytest.raises(ValueError):
        _video.decode([request], max_frame_pixels=2**25, num_threads=1)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("container", ["mp4", "avi", "ts", "h264"])
def test_a_bomb_costs_no_memory_and_no_time(corpus: Path, container: str, tmp_path: Path) -> None:
    """A few kilobytes that would decode to frames of 96 MiB each are refused before any is made."""
    bomb = tmp_path / f"bomb.{container}"
    ffmpeg("-i", corpus / "bomb.mp4", "-c", "copy", bomb)

    def child() -> None:
        load([corpus / "h264.mp4"], num_threads=2)  # what decoding itself takes, its libraries' pages too
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started_s = time.process_time()
        (result,) = load([bomb], num_threads=2, deadline_s=60.0).results
        is_in_time = time.process_time() - started_s < 3.0
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os._exit(0 if result.code == "LIMIT_EXCEEDED" and grown_kib < 32 * 1024 and is_in_time else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
def test_two_thousand_opens_leave_no_descriptor_and_no_memory(tmp_path: Path) -> None:
    clips = [tmp_path / name for name in ("a.mp4", "b.mkv", "broken.mp4")]
    for clip in clips[:2]:
        ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=10:d=1", *H264, clip)
    clips[2].write_bytes(clips[0].read_bytes()[:900])
    load(clips * 30)
    descriptors, resident = len(os.listdir("/proc/self/fd")), resident_mib()
    for _ in range(67):
        load(clips * 10, Sampling(fps=2.0), num_threads=2)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert resident_mib() - resident < 16

"""Decoding by hardware, with a fake driver behind the real interface: the CPU path's patches, or a reason."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tempsamp_fast import video
from tempsamp_fast.video import Geometry, Sampling, VideoBatch, load_videos
from tests.video.corpus import ffmpeg
from tests.video.test_nv12 import write_patches_in_torch

pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
from tempsamp_fast import _video
from tempsamp_fast.video import nvdec, target
from tempsamp_fast.video.target import Target
from tests.video.fake_driver import OPEN_THINGS, FakeDriver, build

GEOMETRY = Geometry(patch_size=4, min_pixels=64, max_pixels=2048, total_pixels=None)
EIGHT = Sampling("hf_qwen3", max_frames=8)
EVERY_FRAME = Sampling("hf_qwen3", fps=1e6)
UNKNOWN = 999
"""CUDA_ERROR_UNKNOWN."""


@pytest.fixture(scope="session")
def libraries(pytestconfig: pytest.Config) -> FakeDriver:
    return build(pytestconfig.cache.mkdir("fake_driver"))


@pytest.fixture
def driver(libraries: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """The fake driver as the GPU of `load_videos`, all of it closed again by the end of the test.

    The kernel is replaced by what `test_nv12.py` holds it equal to: Triton's interpreter takes minutes for a clip.
    """
    libraries.reset()
    found = [Target(torch.device("cpu"), libraries.open())]
    monkeypatch.setattr(video, "find_target", lambda device: found[0])
    monkeypatch.setattr(nvdec, "write_patches", write_patches_in_torch)
    yield libraries
    monkeypatch.undo()
    found.clear()
    assert {name: libraries[name] for name in OPEN_THINGS} == dict.fromkeys(OPEN_THINGS, 0)


def load(*paths: Path, sampling: Sampling = EIGHT, device: str = "cuda", **options: object) -> VideoBatch:
    settings: dict = {"backend": "native", "dtype": torch.uint8, "on_error": "partial", "num_threads": 1, **options}
    return load_videos([(path, sampling) for path in paths], GEOMETRY, device=device, **settings)


def on_cpu(*paths: Path, **options: object) -> VideoBatch:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "find_target", target.find_target)
        return load(*paths, device="cpu", **options)  # type: ignore[arg-type]


def assert_same(ours: VideoBatch, expected: VideoBatch) -> None:
    assert torch.equal(ours.pixel_values, expected.pixel_values)
    for result, other in zip(ours.results, expected.results, strict=True):
        assert (result.status, result.code, result.message) == (other.status, other.code, other.message)
        assert torch.equal(result.frame_times_s, other.frame_times_s)
        assert (result.grid_thw, result.second_per_grid) == (other.grid_thw, other.second_per_grid)


def backends(batch: VideoBatch) -> list[str]:
    return [result.backend for result in batch.results]


EXACT = [
    "h264.mp4", "h264.ts", "h264_open_gop.mp4", "h264_open_gop.ts", "h264_pyramid.mp4", "h264_interlaced.mp4",
    "hevc.mp4", "hevc_open_gop.mkv", "hevc.ts", "vp9.webm", "vp9_alt_ref.webm", "vp9_odd.webm", "vp8.webm",
    "rotated_90.mp4", "rotated_180.mp4", "rotated_270.mp4", "edit_list_mid_gop.mp4", "variable_rate.mp4",
    "h264_clock_wraps.ts", "starts_late.mkv", "h264_no_first_key.ts",
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_hardware_gives_the_patches_of_the_cpu(driver: FakeDriver, corpus: Path, name: str) -> None:
    ours, expected = load(corpus / name), on_cpu(corpus / name)
    assert backends(ours) == ["nvdec"]
    if name == "vp9_odd.webm":  # swscale takes another way for odd heights
        assert (ours.pixel_values.int() - expected.pixel_values.int()).abs().float().mean() < 2
    else:
        assert_same(ours, expected)


def test_every_frame_of_a_batch_comes_out_in_order(driver: FakeDriver, corpus: Path) -> None:
    paths = [corpus / name for name in ("h264_pyramid.mp4", "hevc.mp4", "vp9_alt_ref.webm")]
    ours = load(*paths, sampling=EVERY_FRAME, num_threads=3)
    assert backends(ours) == ["nvdec"] * 3
    assert_same(ours, on_cpu(*paths, sampling=EVERY_FRAME))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_patches_are_those_of_the_cpu(driver: FakeDriver, corpus: Path, dtype: torch.dtype) -> None:
    assert_same(load(corpus / "h264.mp4", dtype=dtype), on_cpu(corpus / "h264.mp4", dtype=dtype))


def test_the_kernel_gives_them_too(driver: FakeDriver, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tempsamp_fast.video.nv12 import write_patches

    monkeypatch.setattr(nvdec, "write_patches", write_patches)
    two = Sampling("hf_qwen3", min_frames=2, max_frames=2)
    ours = load(corpus / "h264_16x16.mp4", sampling=two)
    assert backends(ours) == ["nvdec"]
    assert_same(ours, on_cpu(corpus / "h264_16x16.mp4", sampling=two))


def test_ten_bits_come_close_to_the_cpu(driver: FakeDriver, corpus: Path) -> None:
    ours, expected = load(corpus / "hevc_10bit.mp4"), on_cpu(corpus / "hevc_10bit.mp4")
    assert backends(ours) == ["nvdec"]
    assert (ours.pixel_values.int() - expected.pixel_values.int()).abs().float().mean() < 1.5


def test_only_wanted_pictures_are_mapped_each_once_in_the_stream_of_the_caller(
    driver: FakeDriver, corpus: Path
) -> None:
    """The long frames of the clip are wanted more than once."""
    ours = load(corpus / "variable_rate.mp4", sampling=Sampling("pts", fps=25.0))
    assert_same(ours, on_cpu(corpus / "variable_rate.mp4", sampling=Sampling("pts", fps=25.0)))
    distinct = len(set(ours.results[0].frame_times_s.tolist()))
    assert distinct < ours.results[0].num_frames
    assert driver["cuvidMapVideoFrame"] == driver["cuvidUnmapVideoFrame"] == distinct


def test_surfaces_hold_the_pictures_of_the_command_line(driver: FakeDriver, corpus: Path) -> None:
    """Cut out of a larger coded picture, in the order of a stream of one's own."""
    driver["crop_left"], driver["crop_top"] = 6, 4
    ((index, _),) = _video.index(
        [str(corpus / "h264.mp4")], [10.0], max_frame_pixels=2**25, max_num_frames=10**6, num_threads=1
    )
    assert index is not None
    surfaces = torch.zeros(3, 84, 280, dtype=torch.uint8)
    request = {"index": index, "frames": [3, 70, 149], "bit_depth": 8, "deadline_s": 10.0,
               "out": surfaces.data_ptr(), "out_bytes": surfaces.nbytes}  # fmt: skip
    ((states, status, counts),) = driver.open().decode([request], stream=1234, max_frame_pixels=2**25, num_threads=1)
    raw = ffmpeg("-i", corpus / "h264.mp4", "-pix_fmt", "nv12", "-fps_mode", "passthrough", "-f", "rawvideo", "-")
    frames = np.frombuffer(raw, np.uint8).reshape(-1, 84, 280)
    assert status == ("OK", "") and states.tolist() == [1, 1, 1] and driver["stream"] == 1234
    assert np.array_equal(surfaces.numpy(), frames[[3, 70, 149]])
    assert counts["decoded"] < 40


def test_decoders_are_kept_and_reconfigured(driver: FakeDriver, corpus: Path) -> None:
    large, small = corpus / "h264_interlaced.mp4", corpus / "h264_16x16.mp4"
    assert_same(load(large, small, large), on_cpu(large, small, large))
    load(small)
    assert (driver["cuvidCreateDecoder"], driver["cuvidReconfigureDecoder"]) == (1, 3)
    assert load(corpus / "hevc.mp4").results[0].status == "ok"
    assert driver["cuvidCreateDecoder"] == 2 and driver["most_decoders"] == 1


def test_a_decoder_that_cannot_be_reconfigured_is_opened_again(driver: FakeDriver, corpus: Path) -> None:
    driver["fail:cuvidReconfigureDecoder"] = UNKNOWN
    paths = [corpus / "h264_interlaced.mp4", corpus / "h264_16x16.mp4"]
    ours = load(*paths)
    assert backends(ours) == ["nvdec"] * 2 and driver["cuvidCreateDecoder"] == 2
    assert_same(ours, on_cpu(*paths))


def test_several_decoders_work_at_the_same_time(driver: FakeDriver, corpus: Path) -> None:
    paths = [corpus / name for name in ("h264.mp4", "h264_pyramid.mp4", "h264.ts", "h264_open_gop.mp4")]
    ours = load(*paths, sampling=EVERY_FRAME, num_threads=4)
    assert_same(ours, on_cpu(*paths, sampling=EVERY_FRAME))
    assert 1 < driver["most_decoders"] <= 4
    driver["engines"] = 9
    assert nvdec.most_decoders(driver.open()) == 14


def test_calls_from_several_threads_share_the_decoders(driver: FakeDriver, corpus: Path) -> None:
    paths = [corpus / name for name in ("h264.mp4", "hevc.mp4", "vp9.webm")]
    batches: dict[Path, VideoBatch] = {}
    threads = [
        threading.Thread(target=lambda path=path: batches.update({path: load(path, num_threads=2)})) for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path in paths:
        assert backends(batches[path]) == ["nvdec"]
        assert_same(batches[path], on_cpu(path))


@pytest.mark.parametrize("num_frames", [2, 3])
def test_files_larger_than_the_memory_for_surfaces_are_decoded_in_parts(
    driver: FakeDriver, corpus: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int
) -> None:
    monkeypatch.setattr(nvdec, "SURFACE_BYTES", num_frames * 280 * 84)
    paths = [corpus / "h264.mp4", corpus / "hevc.mp4"]
    seven = Sampling("hf_qwen3", max_frames=7)
    assert_same(load(*paths, sampling=seven), on_cpu(*paths, sampling=seven))


FALLBACKS = {
    "av1.mp4": "no 8-bit av1 on this GPU",
    "h264.avi": "its packets have no times of their own",
    "h264_422_10bit.mp4": "pixel format yuv422p10le",
    "h264_444_odd.mp4": "pixel format yuv444p",
    "mjpeg.avi": "pixel format yuvj420p|no mjpeg in hardware",
    "size_change.h264": "its packets have no times of their own",
    "garbage.mp4": "h264_mp4toannexb|errors in packet|whole",
    "truncated.mp4": "h264_mp4toannexb|errors in packet|whole",
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_hardware_cannot_decode_exactly_the_cpu_decodes(driver: FakeDriver, corpus: Path, name: str) -> None:
    ours = load(corpus / name, corpus / "h264.mp4")
    reason, other = backends(ours)
    assert other == "nvdec" and reason.startswith("native (not nvdec: ")
    assert any(expected in reason for expected in FALLBACKS[name].split("|")), reason
    assert_same(ours, on_cpu(corpus / name, corpus / "h264.mp4"))


@pytest.mark.parametrize(
    "setting, value, reason",
    [
        ("min_width", 288, "280 x 56 is under the 288 x 16 of h264 on this GPU"),
        ("max_size", 279, "280 x 56 is over the 279 x 279 of h264 on this GPU"),
        ("max_blocks", 71, "280 x 56 is over the 4096 x 4096 of h264 on this GPU"),
        ("coded_extra", 1, "its coded size or its crop is odd"),
        ("crop_left", 1, "its coded size or its crop is odd"),
        ("broken_picture", 9, "errors in packet 8"),
        ("mix_up", 1, "the driver takes another picture for packet"),
    ],
)
def test_what_the_driver_says_of_a_stream_is_a_reason(
    driver: FakeDriver, corpus: Path, setting: str, value: int, reason: str
) -> None:
    driver[setting] = value
    ours = load(corpus / "h264.mp4", sampling=EVERY_FRAME)
    assert backends(ours)[0].startswith(f"native (not nvdec: {reason}")
    assert_same(ours, on_cpu(corpus / "h264.mp4", sampling=EVERY_FRAME))


CALLS = ["cuCtxPushCurrent", "cuvidGetDecoderCaps", "cuvidCreateVideoParser", "cuvidCreateDecoder", "cuEventCreate",
         "cuvidParseVideoData", "cuvidDecodePicture", "cuvidMapVideoFrame", "cuMemcpy2DAsync", "cuEventRecord",
         "cuEventSynchronize"]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_every_call_that_fails_is_named_and_leaves_nothing_open(driver: FakeDriver, corpus: Path, call: str) -> None:
    late = {"cuvidDecodePicture", "cuvidMapVideoFrame", "cuMemcpy2DAsync", "cuEventRecord", "cuvidParseVideoData"}
    driver[f"skip:{call}"], driver[f"fail:{call}"] = 3 if call in late else 0, UNKNOWN
    ours = load(corpus / "h264.mp4", sampling=EVERY_FRAME)
    assert backends(ours) == [f"native (not nvdec: {call}: CUDA_ERROR_UNKNOWN (999))"]
    assert_same(ours, on_cpu(corpus / "h264.mp4", sampling=EVERY_FRAME))
    driver[f"fail:{call}"] = 0
    assert backends(load(corpus / "h264.mp4")) == ["nvdec"]


def test_a_picture_that_cannot_be_unmapped_is_named_too(driver: FakeDriver, corpus: Path) -> None:
    driver["fail:cuvidUnmapVideoFrame"] = UNKNOWN
    assert "cuvidUnmapVideoFrame: CUDA_ERROR_UNKNOWN" in backends(load(corpus / "h264.mp4"))[0]
    assert driver["left_mapped"] > 0
    driver["left_mapped"] = 0


def test_a_busy_decoder_is_waited_for_until_the_deadline(driver: FakeDriver, corpus: Path) -> None:
    driver["busy_polls"] = 3
    assert_same(load(corpus / "h264.mp4"), on_cpu(corpus / "h264.mp4"))
    driver["busy_polls"] = 10**9
    (result,) = load(corpus / "h264.mp4", deadline_s=0.5, on_error="skip").results
    assert (result.status, result.code, result.backend) == ("failed", "DEADLINE", "nvdec")


def test_a_large_batch_does_not_use_up_the_deadline_of_each_file(
    driver: FakeDriver, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that makes 10 s of every call for all files."""
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(nvdec, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    results = load(*[corpus / "h264.mp4"] * 8, deadline_s=9.0).results
    assert [(result.status, result.backend) for result in results] == [("ok", "nvdec")] * 8


def test_files_that_nothing_decodes_fail_as_on_the_cpu(driver: FakeDriver, corpus: Path) -> None:
    paths = [corpus / name for name in ("missing.mp4", "h264.mp4", "prose.mp4", "one_frame.mp4")]
    assert_same(load(*paths, on_error="skip"), on_cpu(*paths, on_error="skip"))


def test_a_forked_process_is_told_to_spawn(driver: FakeDriver, corpus: Path) -> None:
    load(corpus / "h264.mp4")

    def child(answers) -> None:
        try:
            load(corpus / "h264.mp4")
        except RuntimeError as error:
            answers.put(str(error))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    assert "'spawn'" in answers.get(timeout=60)
    process.join(timeout=60)
    assert process.exitcode == 0


def test_torchcodec_is_used_when_asked_for(driver: FakeDriver, corpus: Path) -> None:
    batch = load(corpus / "h264_zero_start.ts", corpus / "h264.mp4", backend="torchcodec", on_error="skip")
    assert backends(batch)[1] == "torchcodec (not nvdec: backend is 'torchcodec')"


@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_a_driver_that_does_not_start_says_which_call_failed(libraries: FakeDriver, call: str) -> None:
    libraries.reset()
    libraries[f"fail:{call}"] = UNKNOWN
    with pytest.raises(RuntimeError, match=f"{call}: CUDA_ERROR_UNKNOWN"):
        libraries.open()
    libraries.reset()


def test_missing_libraries_and_functions_are_named(libraries: FakeDriver) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere\.so"):
        _video.Nvdec(0, libcuda="nowhere.so")
    with pytest.raises(RuntimeError, match=r"nowhere\.so"):
        _video.Nvdec(0, libcuda=str(libraries.libcuda), libnvcuvid="nowhere.so")
    with pytest.raises(RuntimeError, match=r"too old: .* has no cuvidGetDecoderCaps"):
        _video.Nvdec(0, libcuda=str(libraries.libcuda), libnvcuvid=str(libraries.libcuda))


def test_targets(libraries: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `device` means without CUDA, with it, and with a GPU that decodes nothing."""
    for wrong in ("gpu", "cuda:", "cuda:x", "mps"):
        with pytest.raises(ValueError, match="device must be 'cpu', 'auto', 'cuda' or"):
            target.find_target(wrong)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        target.find_target("cuda")
    assert target.find_target("auto") == Target(torch.device("cpu"), reason="there is no CUDA device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    names = {"libcuda": str(libraries.libcuda), "libnvcuvid": str(libraries.libnvcuvid)}
    opened = _video.Nvdec
    monkeypatch.setattr(_video, "Nvdec", lambda ordinal: opened(ordinal, **names))
    with pytest.raises(ValueError, match="there are 1 CUDA devices"):
        target.find_target("cuda:1")
    libraries.reset()
    libraries["no_engines"] = 1
    target._with_cuda.cache_clear()
    assert target.find_target("cuda").reason == "this GPU has no hardware decoders"
    libraries.reset()
    target._with_cuda.cache_clear()
    assert target.find_target("auto").decoders is target.find_target("cuda:0").decoders is not None
    target._with_cuda.cache_clear()


def test_without_cuda_auto_is_the_cpu_and_says_so(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = load(corpus / "h264.mp4", device="auto")
    assert backends(batch) == ["native (not nvdec: there is no CUDA device)"]
    assert_same(batch, load(corpus / "h264.mp4", device="cpu"))

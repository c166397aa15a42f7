"""The extension's patches have the bits of torchcodec's frames after torch's resize, and of the closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from tempsamp_fast.video import Geometry, Limits, Sampling, load_videos
from tempsamp_fast.video.patches import normalise_rows, patchify, resize_frames, unpatchify
from tests.video.corpus import ffmpeg

native = pytest.importorskip("tempsamp_fast.video.native", reason="the extension tempsamp_fast._video is not built")
from tempsamp_fast import _video  # noqa: E402

X264 = ["-c:v", "libx264", "-preset", "veryfast", "-bf", "3"]
X265 = ["-c:v", "libx265", "-preset", "ultrafast", "-x265-params", "log-level=none:bframes=4:b-adapt=0"]
VP9 = ["-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"]
AV1 = ["-c:v", "libsvtav1", "-preset", "12"]
BT709 = ["-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"]
FULL_RANGE = ["-vf", "scale=out_range=full", "-color_range", "pc"]
FULL_709 = ["-vf", "scale=out_color_matrix=bt709:out_range=full", "-colorspace", "bt709", "-color_range", "pc"]
BT2020 = ["-vf", "scale=out_color_matrix=bt2020", "-colorspace", "bt2020nc"]

CLIPS = {
    "h264": ("320x240", X264, "mp4"),
    "h264_709": ("320x240", [*X264, *BT709], "mp4"),
    "h264_full": ("320x240", [*X264, *FULL_RANGE], "mp4"),
    "h264_709_full": ("320x240", [*X264, *FULL_709], "mkv"),
    "h264_2020": ("320x240", [*X264, *BT2020], "mp4"),
    "h264_422": ("162x122", [*X264, "-pix_fmt", "yuv422p"], "mp4"),
    "h264_10bit": ("162x122", [*X264, "-pix_fmt", "yuv420p10le"], "mp4"),
    "hevc": ("352x288", X265, "mp4"),
    "hevc_709": ("352x288", [*X265, *BT709], "mkv"),
    "vp9": ("322x180", VP9, "webm"),
    "vp9_odd_width": ("321x180", VP9, "webm"),
    "vp9_odd_both": ("179x101", VP9, "webm"),
    "av1": ("320x180", AV1, "mp4"),
    "upscaled": ("32x16", X264, "mp4"),
    "aspect_150": ("2400x16", X264, "mp4"),
    "wide": ("2048x64", X264, "mp4"),
    "tall": ("64x2048", X264, "mp4"),
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One clip of moving patterns for each of CLIPS."""
    folder = tmp_path_factory.mktemp("clips")
    paths = {}
    for name, (size, arguments, container) in CLIPS.items():
        paths[name] = folder / f"{name}.{container}"
        pixel_format = [] if "-pix_fmt" in arguments else ["-pix_fmt", "yuv420p"]
        source = ["-f", "lavfi", "-i", f"testsrc2=s={size}:r=12:d=1.5"]
        ffmpeg(*source, *pixel_format, *arguments, "-threads", "1", paths[name])
    return paths


def expected_rows(frames: Tensor, geometry: Geometry, dtype: torch.dtype = torch.float32) -> Tensor:
    size = geometry.frame_size(len(frames), *frames.shape[-2:])
    return normalise_rows(patchify(resize_frames(frames, size), geometry), geometry, dtype)


def frames_at(path: Path, indices: Tensor) -> Tensor:
    return VideoDecoder(str(path)).get_frames_at(indices.tolist()).data


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", CLIPS)
def test_patches_have_the_bits_of_torchcodec_and_torch(name: str, family: str, clips: dict[str, Path]) -> None:
    geometry = Geometry.of_family(family, max_pixels=200 * 28 * 28)  # type: ignore[arg-type]
    sampling = Sampling("hf_qwen3", fps=5.0)
    batch = load_videos([(clips[name], sampling)], geometry, backend="native", num_threads=1)
    count = len(VideoDecoder(str(clips[name])))
    wanted = torch.from_numpy(np.linspace(0, count - 1, batch.results[0].num_frames).round()).long()
    assert torch.equal(batch.pixel_values, expected_rows(frames_at(clips[name], wanted), geometry))


def test_an_odd_number_of_frames_repeats_the_last(clips: dict[str, Path]) -> None:
    batch = load_videos([(clips["h264"], Sampling("hf_qwen3", fps=5.0))], Geometry(), backend="native")
    assert batch.results[0].num_frames == 7
    frames = unpatchify(batch.pixel_values, batch.results[0].grid_thw, Geometry())
    assert len(frames) == 8 and torch.equal(frames[6], frames[7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_dtypes_are_the_same_frames_rounded_or_not_normalised(
    family: str, dtype: torch.dtype, clips: dict[str, Path]
) -> None:
    geometry = Geometry.of_family(family)  # type: ignore[arg-type]
    batch = load_videos([(clips["hevc"], Sampling(fps=4.0))], geometry, backend="native", dtype=dtype)
    frames = frames_at(clips["hevc"], torch.arange(0, 18, 3))
    assert torch.equal(batch.pixel_values, expected_rows(frames, geometry, dtype))


@pytest.mark.parametrize("mode", ["pts", "qwen_utils", "hf_qwen2", "hf_qwen3"])
def test_every_sampling_mode_takes_the_frames_torchcodec_takes(mode: str, clips: dict[str, Path]) -> None:
    request = [(clips["vp9"], Sampling(mode, fps=3.0, start_s=0.25))]  # type: ignore[arg-type]
    ours, theirs = (load_videos(request, Geometry(), backend=name) for name in ("native", "torchcodec"))  # type: ignore[arg-type]
    assert torch.equal(ours.pixel_values, theirs.pixel_values)
    assert ours.results[0].frame_times_s.tolist() == pytest.approx(theirs.results[0].frame_times_s.tolist(), abs=1e-9)
    assert ours.second_per_grid.tolist() == pytest.approx(theirs.second_per_grid.tolist())


def closed_form(planes: np.ndarray, height: int, width: int, matrix: tuple[int, ...], full: bool) -> np.ndarray:
    """yuv420p bytes [n, height * width * 3 / 2] -> RGB [n, 3, height, width], in 16.16 fixed point, nearest chroma."""

    def fixed(value: int) -> int:
        return ((value << 13) + 32768) >> 16

    red_v, blue_u, green_u, green_v = (int(value * 224 / 255) if full else value for value in matrix)
    luma_end, chroma = height * width, height * width // 4
    luma, u, v = np.split(planes.astype(np.int64) << 3, [luma_end, luma_end + chroma], axis=1)
    u, v = (c.reshape(-1, height // 2, width // 2).repeat(2, 1).repeat(2, 2) - 1024 for c in (u, v))
    scale, offset = (fixed(65536), 0) if full else (fixed(65536 * 255 // 219), 128)
    luma = (luma.reshape(-1, height, width) - offset) * scale >> 16
    red = luma + (v * fixed(red_v) >> 16)
    green = luma + (u * fixed(-green_u) >> 16) + (v * fixed(-green_v) >> 16)
    blue = luma + (u * fixed(blue_u) >> 16)
    return np.stack([red, green, blue], axis=1).clip(0, 255)


@pytest.mark.parametrize(
    ("arguments", "matrix", "full"),
    [
        ([], (104597, 132201, 25675, 53279), False),
        (["-colorspace", "smpte170m"], (104597, 132201, 25675, 53279), False),
        (["-colorspace", "bt709"], (117489, 138438, 13975, 34925), False),
        (["-colorspace", "bt709", "-color_range", "pc"], (117489, 138438, 13975, 34925), True),
        (["-color_range", "pc"], (104597, 132201, 25675, 53279), True),
        (["-colorspace", "bt2020nc"], (110013, 140363, 12277, 42626), False),
    ],
)
def test_rgb_is_the_closed_form_for_every_value(
    arguments: list[str], matrix: tuple[int, ...], full: bool, tmp_path: Path
) -> None:
    height, width = 112, 168
    raw = np.random.default_rng(0).integers(0, 256, (4, height * width * 3 // 2), dtype=np.uint8)
    source = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{width}x{height}", "-r", "2", "-i", "-"]
    lossless = ["-c:v", "libx264", "-qp", "0", "-preset", "ultrafast"]
    ffmpeg(*source, *arguments, *lossless, tmp_path / "noise.mkv", data=raw.tobytes())
    batch = load_videos([(tmp_path / "noise.mkv", Sampling())], Geometry(), backend="native", dtype=torch.uint8)
    frames = unpatchify(batch.pixel_values, batch.results[0].grid_thw, Geometry()).numpy()
    assert np.array_equal(frames, closed_form(raw, height, width, matrix, full))


@pytest.mark.parametrize("simd", _video.simd_levels())
@pytest.mark.parametrize("name", ["h264", "vp9_odd_width", "upscaled", "wide", "tall"])
def test_every_instruction_set_gives_the_same_bits(name: str, simd: str, clips: dict[str, Path]) -> None:
    for patch_size, (height, width) in [(14, (56, 84)), (14, (224, 280)), (16, (96, 1088)), (16, (256, 32))]:
        geometry = Geometry(patch_size=patch_size)
        index, _ = _video.index([str(clips[name])], [10.0], max_frame_pixels=2**25, max_num_frames=1000, num_threads=1)[
            0
        ]
        assert index is not None
        plan = native.Plan(index, np.array([0, 4]), np.array([0.0, 0.4]), 0.0, 0.5, (height, width))
        for dtype in (torch.float32, torch.bfloat16) if patch_size == 14 else (torch.float32, torch.uint8):
            made = []
            for level in (simd, "portable"):
                out = torch.full((plan.num_patches(geometry), geometry.row_width), 77, dtype=dtype)
                request = plan.request(out, geometry, 10.0)
                (answer,) = _video.decode([request], max_frame_pixels=2**25, num_threads=1, simd=level)
                assert answer[0].tolist() == [native.GOOD] * 2
                made.append(out)
            assert torch.equal(*made)


def test_a_lost_frame_leaves_its_place_to_the_next_also_where_padding_makes_as_many_patches(corpus: Path) -> None:
    """An odd number of good frames of an even number wanted: the same patches in number, others in content."""
    geometry = Geometry(min_pixels=28 * 28, total_pixels=None)
    wanted = Sampling("hf_qwen3", max_frames=8)
    batch = load_videos(
        [(corpus / "truncated.mp4", wanted)], geometry, backend="native", dtype=torch.uint8, on_error="partial"
    )
    (result,) = batch.results
    frames = unpatchify(batch.pixel_values, result.grid_thw, geometry)
    assert result.status == "partial" and result.num_frames % 2 == 1
    assert torch.equal(frames[result.num_frames], frames[result.num_frames - 1])


@pytest.mark.parametrize(
    ("states", "code"),
    [((1, 1, 0, 0), "TRUNCATED"), ((1, 1, 2, 0), "DAMAGED"), ((1, 1, 1, 2), "DAMAGED"), ((1, 0, 1, 1), "DAMAGED")],
)
def test_a_video_is_cut_off_where_nothing_but_its_end_is_missing(
    states: tuple[int, ...], code: str, clips: dict[str, Path]
) -> None:
    """Damaged frames (2) at its end are no cut, nor are missing ones (0) before good ones (1)."""
    index = native.read_index(clips["h264"], 10.0, Limits())
    plan = native.Plan(index, np.arange(4), np.arange(4) / 12, 0.0, 1 / 12, (56, 84))
    rows = torch.zeros(plan.num_patches(Geometry()), Geometry().row_width, dtype=torch.uint8)
    _, result = plan.result(clips["h264"], rows, Geometry(), np.array(states), ("OK", ""), keep_partial=True)
    assert (result.status, result.code, result.num_frames) == ("partial", code, states.count(1))


def test_raw_pictures_in_y4m_have_the_bits_of_torchcodec(tmp_path: Path) -> None:
    path = tmp_path / "clip.y4m"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=168x112:r=12:d=1", "-pix_fmt", "yuv420p", path)
    batch = load_videos([(path, Sampling("hf_qwen3", fps=4.0))], Geometry(), backend="native")
    assert torch.equal(batch.pixel_values, expected_rows(frames_at(path, torch.tensor([0, 4, 7, 11])), Geometry()))

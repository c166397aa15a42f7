"""The embedded data set: what the generator claims about its files, its spans and its cache."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tempsamp_fast.embedded import videos as synthetic
from tempsamp_fast.embedded.render import COLOURS, Clip, frame_times, render
from tempsamp_fast.embedded.videos import SyntheticConfig, Video, draw_videos, generate

# Ten training videos hold every kind of encoding once; one event and no distractors make colours tell the span.
CONFIG = SyntheticConfig(
    num_train=10, num_val=1, num_test=1, min_duration_s=6, max_duration_s=9, max_events=1, num_distractors=0
)
PLAN = draw_videos(CONFIG)
VIDEOS = [video for videos in PLAN.values() for video in videos]
ONE_OF_EACH = [PLAN["train"][index] for index in (0, 3, 6, 9)]
NAMES_OF_EACH = ["h264", "h264-variable-rate", "hevc", "vp9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("data"), CONFIG)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def probe(path: Path) -> tuple[dict, list[dict]]:
    """What ffprobe says of a file: the video stream with the container's duration, and the frames in display order."""
    entries = "stream=codec_name,width,height,avg_frame_rate,pix_fmt:format=duration:frame=pts_time,pict_type,key_frame"
    command = ["ffprobe", "-v", "error", "-show_entries", entries, "-of", "json", str(path)]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return answer["streams"][0] | answer["format"], answer["frames"]


def decode(path: Path, video: Video) -> np.ndarray:
    """Decoded frames, RGB uint8 [num_frames, height, width, 3]."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-fps_mode", "passthrough", "-f", "rawvideo"]
    pixels = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    return np.frombuffer(pixels, np.uint8).reshape(-1, video.clip.height, video.clip.width, 3)


def best_constant_miou(spans: np.ndarray) -> float:
    """Mean IoU of the one span, on a grid of 0.5 s, that answers all of `spans` [num_queries, 2] best."""
    grid = np.arange(0, spans.max() + 0.5, 0.5)
    start, end = (side.reshape(-1, 1) for side in np.meshgrid(grid, grid))
    overlap = (np.minimum(end, spans[:, 1]) - np.maximum(start, spans[:, 0])).clip(0)
    union = np.maximum(end, spans[:, 1]) - np.minimum(start, spans[:, 0])
    return float(np.where(end > start, overlap / union, 0).mean(axis=1).max())


def test_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert contents(generate(tmp_path, CONFIG, num_workers=1)) == contents(folder)


def test_another_seed_gives_other_videos() -> None:
    assert draw_videos(replace(CONFIG, seed=1))["train"][0].clip != PLAN["train"][0].clip


def test_a_larger_data_set_begins_with_the_smaller_one() -> None:
    assert draw_videos(replace(CONFIG, num_train=15))["train"][:10] == PLAN["train"]


def test_annotations_are_the_plan_in_the_charades_layout(folder: Path) -> None:
    for split, videos in PLAN.items():
        entries = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert entries == {video.video_id: video.annotation for video in videos}
        assert all(set(entry) == {"duration", "timestamps", "sentences"} for entry in entries.values())
    assert sorted(path.name for path in (folder / "videos").iterdir()) == sorted(video.file_name for video in VIDEOS)


@pytest.mark.parametrize("video", ONE_OF_EACH, ids=NAMES_OF_EACH)
def test_ffprobe_agrees_with_the_plan(folder: Path, video: Video) -> None:
    stream, frames = probe(folder / "videos" / video.file_name)
    clip = video.clip
    assert (stream["codec_name"], stream["pix_fmt"]) == (clip.codec.name, "yuv420p")
    assert (stream["width"], stream["height"]) == (clip.width, clip.height)

    times = np.array([float(frame["pts_time"]) for frame in frames])
    np.testing.assert_allclose(times, frame_times(clip), atol=2e-3)
    gaps = np.diff(times) * float(clip.frame_rate)
    assert gaps.max() / gaps.min() > 4 if clip.variable_rate else np.ptp(gaps) < 0.05
    assert abs(float(stream["duration"]) - video.annotation["duration"]) < 1 / clip.frame_rate

    keyframes = np.flatnonzero([frame["key_frame"] for frame in frames])
    assert np.diff(keyframes, append=len(frames)).max() <= clip.keyframe_interval
    has_b_frames = any(frame["pict_type"] == "B" for frame in frames)
    assert has_b_frames == (clip.codec.name != "vp9")  # VP9 has none by design


@pytest.mark.parametrize("video", ONE_OF_EACH, ids=NAMES_OF_EACH)
def test_decoded_frames_are_the_drawn_ones(folder: Path, video: Video) -> None:
    decoded, drawn = decode(folder / "videos" / video.file_name, video), render(video.clip)
    assert decoded.shape == drawn.shape
    assert np.abs(decoded.astype(int) - drawn).mean() < 10  # noise of deviation 8, which encoders smooth away


@pytest.mark.parametrize("video", VIDEOS, ids=lambda video: video.video_id)
def test_the_named_colour_is_on_the_screen_exactly_during_the_span(folder: Path, video: Video) -> None:
    (sentence,), ((start_s, end_s),) = video.annotation["sentences"], video.annotation["timestamps"]
    (colour,) = (rgb for name, rgb in COLOURS.items() if name in sentence.split())
    close = np.abs(decode(folder / "videos" / video.file_name, video).astype(int) - colour).max(axis=-1) < 60
    seen = close.mean(axis=(1, 2)) > 0.02
    times = frame_times(video.clip)
    np.testing.assert_array_equal(seen, (times >= start_s) & (times < end_s))


def test_spans_lie_inside_the_video_and_last_as_configured() -> None:
    config = SyntheticConfig()
    for videos in draw_videos(config).values():
        for video in videos:
            duration = video.annotation["duration"]
            assert config.min_duration_s <= duration <= config.max_duration_s
            shortest, longest = config.min_event_share * duration, config.max_event_share * duration
            for start_s, end_s in video.annotation["timestamps"]:
                assert 0 <= start_s < end_s <= duration
                assert shortest - config.time_step_s < end_s - start_s < longest + config.time_step_s
                assert start_s % config.time_step_s == end_s % config.time_step_s == 0


def test_every_query_has_one_right_span() -> None:
    for video in draw_videos(SyntheticConfig())["train"]:
        kinds = [(actor.colour, actor.shape) for actor in video.clip.actors]
        assert len(set(kinds)) == len(kinds)
        for sentence, span in zip(video.annotation["sentences"], video.annotation["timestamps"], strict=True):
            (named,) = (actor for actor in video.clip.actors if f"{actor.colour} {actor.shape}" in sentence)
            assert [named.start_s, named.end_s] == span


def test_splits_share_no_video_and_the_test_split_has_500_queries() -> None:
    plan = draw_videos(SyntheticConfig())
    videos = [video for split in plan.values() for video in split]
    assert len({video.video_id for video in videos}) == len({video.clip for video in videos}) == len(videos) == 940
    assert sum(len(video.annotation["sentences"]) for video in plan["test"]) >= 500


def test_always_answering_one_span_is_a_weak_baseline() -> None:
    for split, videos in draw_videos(SyntheticConfig()).items():
        spans = np.array([span for video in videos for span in video.annotation["timestamps"]])
        if split != "val":  # too small for a fair figure
            assert best_constant_miou(spans) < 0.35


def test_a_second_call_encodes_nothing_and_a_lost_file_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, made = contents(folder), []
    write_video = synthetic.write_video

    def counted(clip: Clip, path: Path) -> None:
        made.append(path.name)
        write_video(clip, path)

    monkeypatch.setattr(synthetic, "write_video", counted)
    generate(folder, CONFIG)
    assert made == []
    (folder / "videos" / VIDEOS[4].file_name).unlink()
    progress = []
    generate(folder, CONFIG, on_progress=lambda done, total: progress.append((done, total)))
    assert made == [VIDEOS[4].file_name] and progress == [(1, 1)]
    assert contents(folder) == before


def test_another_config_replaces_the_data_set(tmp_path: Path) -> None:
    small = replace(CONFIG, num_train=1, num_val=0, num_test=0)
    first = contents(generate(tmp_path, small))
    second = contents(generate(tmp_path, replace(small, seed=1)))
    assert second.keys() == first.keys()
    assert all(second[name] != first[name] for name in ("manifest.json", "videos/train00000.mp4"))


def test_a_failed_encoding_leaves_no_annotations_and_is_completed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, num_train=2, num_val=0, num_test=0)

    def fail_on_the_second(clip: Clip, path: Path) -> None:
        if path.name == "train00001.mp4":
            raise RuntimeError("no space left")
        path.write_bytes(b"video")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no space left"):
        patch.setattr(synthetic, "write_video", fail_on_the_second)
        generate(tmp_path, config, num_workers=1)
    assert contents(tmp_path).keys() == {"manifest.json", "videos/train00000.mp4"}
    generate(tmp_path, config)
    assert {"videos/train00001.mp4", "annotations/train.json"} <= contents(tmp_path).keys()


def test_without_ffmpeg_the_error_names_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install -y ffmpeg"):
        generate(tmp_path / "data", CONFIG)


def test_what_ffmpeg_says_is_in_the_error(tmp_path: Path) -> None:
    clip = replace(PLAN["train"][0].clip, codec=replace(PLAN["train"][0].clip.codec, encoder="libnothing"))
    with pytest.raises(RuntimeError, match="Unknown encoder 'libnothing'"):
        synthetic.write_video(clip, tmp_path / "clip.mp4")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="neither empty nor a synthetic data set"):
        generate(tmp_path, CONFIG)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": -1}, "num_train must not be negative, got -1"),
        ({"max_events": 0}, "max_events must be at least 1"),
        ({"background": 300.0}, "background must be a grey level"),
        ({"min_event_share": 0.5}, "min_event_share <= max_event_share <= 1, got 0.5 and 0.45"),
        ({"max_event_share": 1.5}, "max_event_share"),
        ({"min_duration_s": 1.0}, "time_step_s <= 0.2, the shortest event, got 0.5"),
        ({"max_duration_s": 7.0}, "max_duration_s"),
        ({"colours": ("mauve",)}, r"\['mauve'\]; choose from \['red'"),
        ({"colours": ("red",), "max_events": 2}, "1 colours x 2 shapes are too few"),
        ({"sizes": ("65x64",)}, "even and at least 32, got '65x64'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_makes_no_data_set_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**change)


def test_the_command_line_fills_the_config(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "data"
    flags = "--num-train 1 --num-val 0 --num-test 0 --max-duration-s 8.5 --colours red blue green --num-workers 1"
    synthetic.main(["--out", str(folder), *flags.split()])
    assert capsys.readouterr().out == f"{folder}\n"
    config = json.loads((folder / "manifest.json").read_text())["config"]
    assert (config["num_train"], config["max_duration_s"], config["colours"]) == (1, 8.5, ["red", "blue", "green"])

    with pytest.raises(SystemExit, match="num_train must not be negative"):
        synthetic.main(["--out", str(folder), "--num-train", "-1"])

"""Folders of numbered images are videos: as a file of the same frames, and refused by name where they are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tempsamp_fast.data.__main__ import check
from tempsamp_fast.data.annotations import load_annotations, read_annotations
from tempsamp_fast.data.catalogue import Dataset
from tempsamp_fast.data.frame_folder import duration_of, load_frame_folder, thumbnails
from tempsamp_fast.video import Geometry, Sampling, VideoError
from tempsamp_fast.video.patch_cache import PatchCache
from tempsamp_fast.video.patches import unpatchify

GEOMETRY = Geometry.of_family("qwen2_5_vl", min_pixels=56 * 56, max_pixels=56 * 56)


def frame_folder(folder: Path, count: int = 20, fps: str = "5", first: int = 0, name: str = "frame_{:05}.PNG") -> Path:
    """Frame i is grey of the value 10 i."""
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(np.full((56, 56, 3), 10 * index, dtype=np.uint8)).save(folder / name.format(first + index))
    if fps:
        (folder / "fps.txt").write_text(fps)
    return folder


def greys(pixel_values: torch.Tensor, grid_thw: tuple[int, int, int]) -> list[int]:
    pictures = unpatchify(pixel_values, grid_thw, GEOMETRY)
    return (pictures.float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


@pytest.mark.parametrize("name", ["{}.png", "{:06}.bmp", "img-{}.PNG", "v2_{}_x.png"])
@pytest.mark.parametrize("first", [0, 1, 98])
def test_frames_are_taken_by_their_times_in_the_order_of_their_numbers(tmp_path: Path, name: str, first: int) -> None:
    """20 frames at 5 a second are 4 seconds: at 2 a second every 0.5 s, the frame that is on screen then."""
    video = load_frame_folder(frame_folder(tmp_path / "v", first=first, name=name), Sampling(fps=2.0), GEOMETRY)
    assert video.grid_thw == (4, 4, 4) and video.second_per_grid == pytest.approx(1.0)
    assert greys(video.pixel_values, video.grid_thw) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert video.timestamps_s.tolist() == pytest.approx([0.2, 1.2, 2.2, 3.2])


@pytest.mark.parametrize("mode", ["qwen_utils", "hf_qwen2"])
def test_the_other_rules_count_frames(tmp_path: Path, mode) -> None:
    video = load_frame_folder(frame_folder(tmp_path / "v"), Sampling(mode, fps=2.5), GEOMETRY)
    shades = greys(video.pixel_values, video.grid_thw)
    assert len(shades) == 10 and shades == sorted(shades)


def test_the_frame_rate_may_stand_one_folder_up_and_thumbnails_are_of_the_frames(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "videos/v", fps="")
    (tmp_path / "videos/fps.txt").write_text("10\n")
    pictures = thumbnails(folder, [0.0, 0.55, 9.0], height=28)
    assert pictures.shape == (3, 3, 28, 28) and (pictures[:, 0, 14, 14] // 10).tolist() == [0, 5, 19]


def test_a_folder_s_own_frame_rate_goes_before_that_of_all(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "videos/v", fps="5")
    (tmp_path / "videos/fps.txt").write_text("10")
    assert duration_of(folder) == 4.0


def test_a_rate_may_be_a_fraction_and_hidden_files_are_no_frames(tmp_path: Path) -> None:
    folder = frame_folder(tmp_path / "v", count=3, fps="30000/1001\n")
    (folder / "._frame_00000.PNG").write_bytes(b"left by another system")
    assert duration_of(folder) == pytest.approx(3 * 1001 / 30000)


def test_annotations_find_a_folder_and_the_check_measures_it(tmp_path: Path) -> None:
    frame_folder(tmp_path / "videos/v1")
    entry = {"duration": 4.0, "timestamps": [[0, 1]], "sentences": ["one"]}
    (tmp_path / "a.json").write_text(json.dumps({"v1": entry, "v2": entry}))
    first, second = load_annotations(tmp_path / "a.json", tmp_path / "videos")
    assert first.video == tmp_path / "videos/v1" and second.video == tmp_path / "videos/v2.mp4"
    problems = check(read_annotations(tmp_path / "a.json", tmp_path / "videos"), Dataset(())).problems
    assert {kind: len(found) for kind, found in problems.items() if found} == {"missing": 1}


@pytest.mark.parametrize(
    ("fps", "durations"), [("5", {4.1: 0, 5.9: 0, 6.5: 1, 3.5: 1}), ("0.25", {104.9: 0, 95.5: 0, 106.0: 1, 94.0: 1})]
)
def test_a_video_may_differ_by_a_second_or_a_twentieth(tmp_path: Path, fps: str, durations: dict[float, int]) -> None:
    """25 frames are 5 s, or 100 s."""
    frame_folder(tmp_path / "videos/v1", count=25, fps=fps)
    for duration_s, num_found in durations.items():
        entry = {"duration": duration_s, "timestamps": [[0, 1]], "sentences": ["one"]}
        (tmp_path / "a.json").write_text(json.dumps({"v1": entry}))
        found = check(read_annotations(tmp_path / "a.json", tmp_path / "videos"), Dataset(()))
        assert len(found.problems["inconsistent"]) == num_found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: (v / "fps.txt").unlink(), "needs its frame rate"),
        *(
            (lambda v, fps=fps: (v / "fps.txt").write_text(fps), "does not hold one number")
            for fps in ("fast", "-1", "0", "", "nan", "1e300", "1e-300", "30/0", "1/2/3", "25\n30", "2,5", "25 fps")
        ),
        (lambda v: (v / "frame_00007.PNG").unlink(), "has no image of the number 7"),
        (lambda v: (v / "frame_00001.PNG").unlink(), "has no image of the number 1"),
        (lambda v: (v / "other_7.jpg").touch(), "have the same number"),
        (lambda v: (v / "frame_00005.PNG").write_bytes(b"no image"), "frame_00005.PNG cannot be read"),
        (lambda v: Image.new("RGB", (60, 56)).save(v / "frame_00005.PNG"), "frame_00005.PNG is not 56 x 56"),
        (lambda v: [path.unlink() for path in v.glob("*.PNG")], "has 0 numbered images"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_name(tmp_path: Path, change, said: str) -> None:
    folder = frame_folder(tmp_path / "v")
    change(folder)
    with pytest.raises(VideoError, match="^" + str(folder)) as error:
        load_frame_folder(folder, Sampling(fps=5.0), GEOMETRY)
    assert said in str(error.value)


def test_a_changed_frame_or_rate_is_another_video_to_the_patch_cache(tmp_path: Path) -> None:
    """Also one changed in place, which leaves the folder's own time as it was."""
    folder = frame_folder(tmp_path / "videos/v", count=8, fps="")
    above = tmp_path / "videos/fps.txt"
    above.write_text("5")
    cache, sampling = PatchCache(tmp_path / "kept", GEOMETRY), Sampling(fps=2.0)
    cache.put(folder, sampling, load_frame_folder(folder, sampling, GEOMETRY))
    assert cache.get(folder, sampling) is not None
    Image.new("RGB", (56, 56), (1, 2, 3)).save(folder / "frame_00003.PNG")
    assert cache.get(folder, sampling) is None
    cache.put(folder, sampling, load_frame_folder(folder, sampling, GEOMETRY))
    above.write_text("10")
    assert cache.get(folder, sampling) is None

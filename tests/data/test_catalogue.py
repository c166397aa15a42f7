"""Data sets by name or file, and what a run makes of them: filters, few-shot subsets, out-of-domain pairs."""

import json
import logging
from pathlib import Path

import pytest

from tempsamp_fast.config import DataConfig
from tempsamp_fast.data.catalogue import dataset_name, load_samples, load_training_data


def write(path: Path, **durations: float) -> Path:
    """Annotations of two queries a video, the spans half and a quarter as long as the video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {
        name: {"duration": d, "timestamps": [[0, d / 2], [d / 2, d * 3 / 4]], "sentences": ["one", "two"]}
        for name, d in durations.items()
    }
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def charades(tmp_path: Path) -> Path:
    """The folder of videos; both annotation files lie above it."""
    write(tmp_path / "charades_train.json", a=10, b=20, c=30, d=40)
    write(tmp_path / "charades_test.json", e=10, f=20)
    (tmp_path / "videos").mkdir()
    return tmp_path / "videos"


def settings(videos: Path, **changes) -> DataConfig:
    names = {"annotations": "charades-train", "eval_annotations": "charades-test", "videos": str(videos)}
    return DataConfig(**{**names, **changes})


def ids(samples) -> list[str]:
    return [sample.sample_id for sample in samples]


def test_a_data_set_is_found_by_its_name_or_taken_as_a_file(charades):
    by_name = load_samples("charades-test", charades)
    assert by_name == load_samples(str(charades.parent / "charades_test.json"), charades)
    assert ids(by_name) == ["e/0", "e/1", "f/0", "f/1"]


def test_a_name_that_is_none_is_refused_with_the_choices(charades):
    with pytest.raises(ValueError, match=r"annotations='charades': no such file, and no data set of charades-train"):
        load_samples("charades", charades)
    with pytest.raises(ValueError, match=r"no qvhighlights_val\.jsonl or .* in .*videos or above"):
        load_samples("qvhighlights-val", charades)


def test_a_file_of_a_usual_name_is_known():
    assert dataset_name("charades-test") == dataset_name("there/charades_sta_test.txt") == "charades-test"
    assert dataset_name("mine.json") is None


def test_filters_and_few_shot_act_on_training_alone(charades):
    train, test = load_training_data(settings(charades, duration_range="15:35", window_range=":10"))
    assert (ids(train), len(test)) == (["b/0", "b/1", "c/1"], 4)
    train, test = load_training_data(settings(charades, few_shot_videos=2, few_shot_queries="one", max_eval_samples=3))
    assert (len(train), len(test)) == (2, 3)
    assert train == load_training_data(settings(charades, few_shot_videos=2, few_shot_queries="one"))[0]
    both = [load_training_data(settings(charades, few_shot_videos=n, few_shot_seed=1))[0] for n in (1, 3)]
    assert [len(samples) for samples in both] == [2, 6] and set(both[0]) < set(both[1])


def test_another_few_shot_seed_draws_other_videos(charades):
    drawn = {ids(load_training_data(settings(charades, few_shot_videos=1, few_shot_seed=n))[0])[0] for n in range(8)}
    assert len(drawn) > 1


def test_filters_that_leave_nothing_are_named(charades):
    with pytest.raises(ValueError, match=r"none of 8 samples lies within .*'duration_s': \(50.0, inf\)"):
        load_training_data(settings(charades, duration_range="50:"))
    with pytest.raises(ValueError, match="sample 'a/0' has no difficulty"):
        load_training_data(settings(charades, difficulty_range=":0.5"))


def test_an_out_of_domain_pair_is_read_from_two_folders_and_shares_no_video(charades, tmp_path):
    other = tmp_path / "activitynet/videos"
    write(tmp_path / "activitynet/val_2.json", v_x=10)
    pair = {"eval_annotations": "activitynet-test", "eval_videos": str(other)}
    train, test = load_training_data(settings(charades, **pair))
    assert train[0].video.parent == charades and test[0].video == other / "v_x.mp4"
    write(tmp_path / "activitynet/val_2.json", v_x=10, c=5)
    with pytest.raises(ValueError, match="1 videos are in training and in test: c"):
        load_training_data(settings(charades, **pair))


def test_training_videos_among_the_held_out_ones_are_told(charades, caplog):
    with caplog.at_level(logging.WARNING):
        load_training_data(settings(charades, eval_annotations="charades-train"))
    assert "4 videos are in training and in test: a, b, c, d" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"duration_range": "5"}, "duration_range='5': must be low:high"),
        ({"window_range": "9:2"}, "window_range='9:2': must be low:high"),
        ({"difficulty_range": "easy:"}, "difficulty_range='easy:': must be low:high"),
        ({"few_shot_videos": 0}, "few_shot_videos=0: must be at least 1"),
        ({"few_shot_videos": 9}, "few_shot_videos=9: must be between 1 and the 4 videos"),
        ({"eval_annotations": None, "eval_videos": "v"}, "eval_videos='v': must be given with eval_annotations"),
    ],
)
def test_bad_settings_are_named(charades, changes, message):
    with pytest.raises(ValueError, match=message):
        load_training_data(settings(charades, **changes))

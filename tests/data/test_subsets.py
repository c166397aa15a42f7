"""Few-shot subsets, filters, and the check that a pair of data sets shares no video."""

from pathlib import Path

import pytest

from tempsamp_fast.data.subsets import few_shot, shared_videos, within
from tempsamp_fast.sample import Sample


def sample(video, query=0, duration_s=30.0, window=(0.0, 5.0), difficulty=None):
    return Sample(f"{video}/{query}", Path(f"{video}.mp4"), "q", duration_s, (window,), difficulty=difficulty)


SAMPLES = [sample(f"v{video}", query) for video in range(20) for query in range(3)]


def videos(samples):
    return {s.video_id for s in samples}


def test_few_shot_keeps_all_queries_of_the_drawn_videos_in_file_order():
    drawn = few_shot(SAMPLES, 5, seed=1)
    assert len(videos(drawn)) == 5 and len(drawn) == 15
    assert drawn == [s for s in SAMPLES if s.video_id in videos(drawn)]


def test_few_shot_is_seeded_and_nested_and_ignores_the_order_of_the_file():
    assert few_shot(SAMPLES, 5, seed=1) == few_shot(SAMPLES, 5, seed=1) != few_shot(SAMPLES, 5, seed=2)
    assert videos(few_shot(SAMPLES, 5, seed=1)) < videos(few_shot(SAMPLES, 10, seed=1))
    assert videos(few_shot(SAMPLES[::-1], 5, seed=1)) == videos(few_shot(SAMPLES, 5, seed=1))


def test_few_shot_can_draw_one_query_per_video():
    drawn = few_shot(SAMPLES, 20, one_query_per_video=True)
    assert len(drawn) == 20 and len(videos(drawn)) == 20
    assert len({s.sample_id[-1] for s in drawn}) == 3


@pytest.mark.parametrize("num_videos", [0, 21])
def test_few_shot_names_a_number_it_cannot_draw(num_videos):
    with pytest.raises(ValueError, match=rf"few_shot_videos={num_videos}: must be between 1 and the 20 videos"):
        few_shot(SAMPLES, num_videos)


def test_ranges_include_their_ends():
    samples = [sample("a", difficulty=0.2), sample("b", duration_s=60.0, window=(0.0, 40.0), difficulty=0.8)]
    assert videos(within(samples)) == {"a", "b"}
    assert videos(within(samples, duration_s=(30.0, 59.9))) == {"a"}
    assert videos(within(samples, window_s=(5.1, 40.0))) == {"b"}
    assert videos(within(samples, difficulty=(0.2, 0.5))) == {"a"}


def test_of_several_windows_the_longest_lies_in_the_range():
    several = Sample("a/0", Path("a.mp4"), "q", 30.0, ((0.0, 5.0), (10.0, 20.0)))
    assert within([several], window_s=(8.0, 12.0)) == [several] and within([several], window_s=(0.0, 6.0)) == []


def test_difficulty_of_a_data_set_without_it_is_an_error():
    with pytest.raises(ValueError, match="sample 'a/0' has no difficulty"):
        within([sample("a")], difficulty=(0, 1))


def test_videos_in_training_and_test_are_named():
    assert shared_videos(SAMPLES, [sample("w1")]) == []
    assert shared_videos(SAMPLES, [sample("v7"), sample("w1"), sample("v3")]) == ["v3", "v7"]


def test_files_of_one_name_that_differ_in_size_are_two_videos(tmp_path):
    files = [tmp_path / name for name in ("one/1.mp4", "two/1.mkv", "three/1.webm")]
    for path, content in zip(files, ("same", "same", "another"), strict=True):
        path.parent.mkdir()
        path.write_text(content)
    one, two, three, gone = ([Sample("s", path, "q", 9.0, ((0.0, 5.0),))] for path in (*files, tmp_path / "four/1.mp4"))
    assert shared_videos(one, three) == [] and shared_videos(one + three, two) == ["1"]
    assert shared_videos(one, one) == shared_videos(one, two) == shared_videos(one, gone) == ["1"]


def test_the_longest_window_of_a_sample_lies_in_the_range():
    several = Sample("a/0", Path("a.mp4"), "q", 30.0, ((0.0, 2.0), (4.0, 12.0), (20.0, 21.0)))
    assert within([several], window_s=(8.0, 8.0)) == [several]
    assert within([several], window_s=(0.0, 7.9)) == within([several], window_s=(8.1, 30.0)) == []

"""Decoding ahead: in order, bounded, once per video, errors where they belong, nothing left running."""

from __future__ import annotations

import multiprocessing
import threading
import time
from pathlib import Path

import pytest
import torch

from tempsamp_fast.video import Sampling, VideoError, load_videos, prefetch
from tempsamp_fast.video.patch_cache import PatchCache
from tempsamp_fast.video.prefetch import VideoLoader
from tests.video.verdict import GEOMETRY

SAMPLING = Sampling()


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_batches_arrive_in_order_with_the_patches_of_load_videos(corpus: Path) -> None:
    batches = [[corpus / "h264.mp4", corpus / "vp9.webm"], [corpus / "hevc.mp4"], [corpus / "h264.mp4"]]
    with VideoLoader(batches, SAMPLING, GEOMETRY) as loader:
        loaded = list(loader)
    assert [list(videos.patches) for videos in loaded] == batches
    expected = load_videos([(corpus / "hevc.mp4", SAMPLING)], GEOMETRY, dtype=torch.uint8).split()[0]
    ours = loaded[1].patches[corpus / "hevc.mp4"]
    assert torch.equal(ours.pixel_values, expected.pixel_values) and ours.grid_thw == expected.grid_thw
    assert loader.blocked_s > 0
    assert not loader_threads()


def test_queries_about_one_video_share_one_decode(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []

    def counting(requests, *arguments, **options):
        decoded.extend(path for path, _ in requests)
        return load_videos(requests, *arguments, **options)

    monkeypatch.setattr(prefetch, "load_videos", counting)
    video = corpus / "h264.mp4"
    with VideoLoader([[video, video, video]], SAMPLING, GEOMETRY) as loader:
        assert list(next(loader).patches) == [video]
    assert decoded == [video]


def test_no_more_than_depth_batches_are_made_ahead(corpus: Path) -> None:
    taken = []

    def batches():
        for number in range(50):
            taken.append(number)
            yield [corpus / "h264_16x16.mp4"]

    with VideoLoader(batches(), SAMPLING, GEOMETRY, depth=2) as loader:
        next(loader)
        time.sleep(0.5)
        assert len(taken) <= 4  # one used, two ready or in the making, one begun
    assert not loader_threads()


def test_error_is_raised_at_the_batch_it_belongs_to(corpus: Path) -> None:
    batches = [[corpus / "h264.mp4"], [corpus / "prose.mp4"], [corpus / "h264.mp4"]]
    with VideoLoader(batches, SAMPLING, GEOMETRY) as loader:
        next(loader)
        with pytest.raises(VideoError, match="prose"):
            next(loader)
        assert list(next(loader).patches) == batches[2]
    assert not loader_threads()


def test_skip_hands_over_the_reason(corpus: Path) -> None:
    with VideoLoader([[corpus / "prose.mp4", corpus / "h264.mp4"]], SAMPLING, GEOMETRY, on_error="skip") as loader:
        videos = next(loader)
    assert list(videos.patches) == [corpus / "h264.mp4"]
    assert videos.errors[corpus / "prose.mp4"].code == "OPEN_FAILED"


def test_leaving_early_ends_the_thread(corpus: Path) -> None:
    with VideoLoader([[corpus / "h264.mp4"]] * 100, SAMPLING, GEOMETRY, depth=1) as loader:
        next(loader)
    assert not loader_threads()


def test_failure_of_the_order_itself_reaches_the_consumer() -> None:
    def batches():
        yield []
        raise KeyError("no such split")

    with VideoLoader(batches(), SAMPLING, GEOMETRY) as loader:
        assert next(loader).patches == {}
        with pytest.raises(KeyError, match="no such split"):
            next(loader)


def test_a_forked_process_is_told_instead_of_hanging(corpus: Path) -> None:
    with VideoLoader([[corpus / "h264.mp4"]] * 9, SAMPLING, GEOMETRY) as loader:

        def use(connection) -> None:
            try:
                next(loader)
            except RuntimeError as error:
                connection.send(str(error))

        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=use, args=(sender,))
        process.start()
        assert receiver.poll(20) and "fork" in receiver.recv()
        process.join()


def test_loading_works_in_a_forked_worker(corpus: Path) -> None:
    """As in a DataLoader: the parent has decoded before, the child decodes with threads of its own."""
    requests = [(corpus / "h264.mp4", SAMPLING), (corpus / "hevc.mp4", SAMPLING)]
    expected = load_videos(requests, GEOMETRY, dtype=torch.uint8, num_threads=2).pixel_values

    def work(connection) -> None:
        connection.send(load_videos(requests, GEOMETRY, dtype=torch.uint8, num_threads=2).pixel_values.numpy())

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    assert receiver.poll(30)
    assert torch.equal(torch.from_numpy(receiver.recv()), expected)
    process.join()


def test_disk_cache_gives_back_the_same_patches_without_decoding(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = corpus / "vp9_odd.webm"
    with VideoLoader([[video]], SAMPLING, GEOMETRY, cache_folder=tmp_path) as loader:
        first = next(loader).patches[video]

    def only_nothing(requests, *arguments, **options):
        assert not requests
        return load_videos(requests, *arguments, **options)

    monkeypatch.setattr(prefetch, "load_videos", only_nothing)
    with VideoLoader([[video]], SAMPLING, GEOMETRY, cache_folder=tmp_path) as loader:
        again = next(loader).patches[video]
    assert torch.equal(first.pixel_values, again.pixel_values) and torch.equal(first.timestamps_s, again.timestamps_s)
    assert (first.grid_thw, first.second_per_grid) == (again.grid_thw, again.second_per_grid)


def test_disk_cache_forgets_a_file_that_changed_and_survives_damage(corpus: Path, tmp_path: Path) -> None:
    video = tmp_path / "clip.mp4"
    video.write_bytes((corpus / "h264.mp4").read_bytes())
    cache = PatchCache(tmp_path / "patches", GEOMETRY)
    patches = load_videos([(video, SAMPLING)], GEOMETRY, dtype=torch.uint8).split()[0]
    cache.put(video, SAMPLING, patches)
    assert cache.get(video, SAMPLING) is not None
    assert cache.get(video, Sampling(fps=1.0)) is None
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(b"damaged")
    assert cache.get(video, SAMPLING) is None
    cache.put(video, SAMPLING, patches)
    video.write_bytes((corpus / "hevc.mp4").read_bytes())
    assert cache.get(video, SAMPLING) is None

"""Work done ahead of its use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tempsamp_fast.data import prefetch
from tempsamp_fast.data.prefetch import Prefetch


def test_items_come_in_order_and_end() -> None:
    with Prefetch(range(20), depth=3) as items:
        assert list(items) == list(range(20))
        with pytest.raises(StopIteration):
            next(items)


def test_an_error_comes_where_its_item_would_have() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("broken.mp4")

    with Prefetch(failing(), depth=4) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match=r"broken\.mp4"):
            next(items)


def test_no_more_than_depth_items_wait() -> None:
    made = threading.Semaphore(0)

    def counted() -> Iterator[int]:
        for index in range(100):
            made.release()
            yield index

    with Prefetch(counted(), depth=2) as items:
        next(items)
        assert all(made.acquire(timeout=60) for _ in range(3))
        assert not made.acquire(timeout=0.05)


def test_leaving_early_stops_the_thread() -> None:
    with Prefetch(iter(int, 1), depth=1) as items:
        next(items)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_waiting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 2.5 s once the consumer has looked at it and waits."""
    now_s, was_read = 100.0, threading.Event()

    def clock() -> float:
        seen_s = now_s
        was_read.set()
        return seen_s

    def slow() -> Iterator[int]:
        nonlocal now_s
        assert was_read.wait(60)
        now_s += 2.5
        yield 1

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=clock))
    with Prefetch(slow(), depth=1) as items:
        next(items)
        assert items.blocked_s == 2.5


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        Prefetch([], depth=0)

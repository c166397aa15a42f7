"""Work done ahead of its use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

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
    made = []
    with Prefetch((made.append(index) or index for index in range(100)), depth=2) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 3


def test_leaving_early_stops_the_thread() -> None:
    with Prefetch(iter(int, 1), depth=1) as items:
        next(items)
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_waiting_is_measured() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.2)
        yield 1

    with Prefetch(slow(), depth=1) as items:
        next(items)
        assert 0.1 < items.blocked_s < 5


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=0"):
        Prefetch([], depth=0)

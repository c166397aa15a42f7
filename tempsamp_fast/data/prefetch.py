"""Work done ahead of its use, in a background thread, a bounded number of items ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from tempsamp_fast.config.setting import require

Item = TypeVar("Item")

_END = object()


class Prefetch(Generic[Item]):
    """Iterate over `items` while a thread makes the next `depth` of them; a context manager that stops it on leaving.

    Order is kept, and an exception raised while making an item is raised where that item would have come. Worth it
    for items whose making leaves the interpreter lock alone (video decoding does).
    """

    def __init__(self, items: Iterable[Item], depth: int) -> None:
        require(depth >= 1, "depth", depth, "at least 1")
        self.blocked_s = 0.0
        """Seconds that the consumer has waited for items so far."""
        self._items = iter(items)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: deque[Future[Any]] = deque(self._make_next() for _ in range(depth))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        start = time.perf_counter()
        future = self._ahead.popleft()
        self._ahead.append(self._make_next())
        item = future.result()
        self.blocked_s += time.perf_counter() - start
        if item is _END:
            raise StopIteration
        return item

    def __enter__(self) -> Prefetch[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the thread; an item in the making is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def _make_next(self) -> Future[Any]:
        return self._thread.submit(next, self._items, _END)

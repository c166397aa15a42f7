"""How far long work is: a bar on a terminal, elsewhere lines with the count, the time of day and the time left."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

EVERY_S = 20.0
"""Between lines of long work where there is no terminal for a bar."""
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {elapsed}<{remaining}{postfix}"
BESIDE = len(" / |          | 00:00:00<00:00:00")
"""Columns that the bar takes beside label, counts and figures."""
USUAL_COLUMNS = 80
logger = logging.getLogger(__name__)


def columns() -> int:
    """Of the terminal that stderr is; 80 where it is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def fitting(texts: Sequence[str], room: int) -> list[str]:
    """The first of the texts that fit into `room` columns together."""
    ends = itertools.accumulate(map(len, texts))
    return [text for text, end in zip(texts, ends, strict=True) if end <= room]


class Progress:
    """A context manager around the work; log lines that come within do not run into the bar.

    total, done: how much there is to do, and how much of it was done before.
    every_s: least seconds between two lines where there is no bar; the last one always comes.
    """

    def __init__(self, total: int, done: int = 0, every_s: float = 0.0):
        self.total, self.done, self.every_s = total, done, every_s
        self._first, self._start_s, self._said_s = done, time.monotonic(), -every_s
        self._bar = tqdm(total=total, initial=done, bar_format=BAR, dynamic_ncols=True, leave=done == 0, disable=None)
        self._redirected = contextlib.ExitStack()

    def update(self, label: str, figures: Mapping[str, float], by: int = 1) -> None:
        """`by` more is done; `figures`, the most telling first, describe it.

        The time left is told by the pace since the first of it was begun: until then `by` is 0.
        """
        self.done = min(self.done + by, self.total)
        texts = [f", {name}={value:.3g}" for name, value in figures.items()]
        taken = BESIDE + len(f"{label}{self.done}{self.total}")
        self._bar.set_description_str(label, refresh=False)
        self._bar.set_postfix_str("".join(fitting(texts, columns() - taken)).removeprefix(", "), refresh=False)
        self._bar.update(self.done - self._bar.n)
        now, num_done = time.monotonic(), self.done - self._first
        if not num_done:
            self._start_s = now
        if self._bar.disable and (now - self._said_s >= self.every_s or (by and self.done == self.total)):
            self._said_s = now
            left_s = (now - self._start_s) / max(num_done, 1) * (self.total - self.done)
            tail = f", {timedelta(seconds=round(left_s))} left" if num_done else ""
            head = f"{datetime.now():%H:%M:%S} {label} {self.done}/{self.total}"
            described = [f" {name} {value:.3g}" for name, value in figures.items()]
            logger.info("%s%s%s", head, "".join(fitting(described, USUAL_COLUMNS - len(head + tail))), tail)

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            self._redirected.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        self._redirected.close()
        self._bar.close()

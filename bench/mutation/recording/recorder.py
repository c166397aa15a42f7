"""Which lines of the package a process runs, by `sys.settrace`; standard library only, for children import it first."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

Line = tuple[str, int]
"""(absolute file, number from 1)."""


class Recorder:
    """Adds every line that is run in a file under `roots` to `seen`, which may be exchanged at any time."""

    def __init__(self, roots: tuple[str, ...], seen: set[Line]) -> None:
        self.seen = seen
        self._roots = roots
        self._is_inside: dict[str, bool] = {}

    def start(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        inside = self._is_inside.get(file)
        if inside is None:
            inside = self._is_inside[file] = file.startswith(self._roots)
        if not inside:
            return None
        self.seen.add((file, frame.f_lineno))
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


class WrittenLines(set[Line]):
    """Lines that are appended to a file as they come: a child may be killed at any time."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, line: Line) -> None:
        if line not in self:
            super().add(line)
            os.write(self._file, f"{line[0]}:{line[1]}\n".encode())

"""Where the video of an id lies: a file with the suffix of a video in any case, or a folder of frames."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path, PurePath

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv",
                  ".wmv", ".3gp", ".ogv")  # fmt: skip
"""Earlier ones are preferred."""


class NoDuration(ValueError):
    """Neither an annotation nor its video says how long the video is."""


class VideoFolder:
    """The videos below a folder by id; every folder that an id names is listed once. None: nothing is looked for."""

    def __init__(self, folder: str | Path | None) -> None:
        self._folder, self._is_listed = Path(folder or ""), folder is not None
        self._names: dict[Path, dict[str, str]] = {}
        self._durations: dict[Path, float | ValueError] = {}

    def find(self, video_id: str) -> Path | None:
        """`<folder>/<video_id>` with one of `VIDEO_SUFFIXES` that is there, or with that of the id; else a folder.

        Raises ValueError for an id that would leave the folder.
        """
        path = self._folder / _inside(video_id)
        if path.parent not in self._names:
            self._names[path.parent] = _videos_in(path.parent) if self._is_listed else {}
        names = self._names[path.parent]
        called = path.name, _composed(path.name), _composed(path.stem + path.suffix.lower())
        name = next((names[each] for each in called if each in names), None)
        return None if name is None else path.with_name(name)

    def path(self, video_id: str) -> Path:
        """What `find` finds, or where the video should be."""
        named = self._folder / _inside(video_id)
        is_whole = named.suffix.lower() in VIDEO_SUFFIXES
        return self.find(video_id) or (named if is_whole else named.with_name(named.name + VIDEO_SUFFIXES[0]))

    def duration_s(self, place: str, video_id: str) -> float:
        """Seconds that the video itself lasts. Raises ValueError, beginning with `place`, where it cannot be read:
        `NoDuration` for a video that is not there or is broken.
        """
        try:
            found = self.find(video_id)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if found is None:
            where = f"not in {self._folder}" if self._is_listed else "not looked for"
            raise NoDuration(f"{place}: no duration is given, and the video is {where} (--videos)")
        if found not in self._durations:
            from tempsamp_fast.data.frame_folder import duration_of

            try:
                self._durations[found] = duration_of(found)
            except ValueError as error:
                self._durations[found] = error
        lasts = self._durations[found]
        if isinstance(lasts, ValueError):
            raise NoDuration(f"{place}: no duration is given, and the video cannot be read: {lasts}") from lasts
        return lasts


def _inside(video_id: str) -> PurePath:
    path = PurePath(video_id)
    if not path.name or path.is_absolute() or ".." in path.parts or not video_id.isprintable():
        raise ValueError(f"video {video_id[:90]!r} is not a path inside the video folder")
    return path


def _videos_in(folder: Path) -> dict[str, str]:
    """Names of files and folders, by what an id may call them, accents composed (archives of macOS part them)."""
    try:
        with os.scandir(folder) as entries:
            is_folder = {entry.name: entry.is_dir() for entry in entries if entry.is_dir() or entry.is_file()}
    except OSError:
        return {}
    suffixes = {name: PurePath(name).suffix for name in is_folder}
    files = [name for name, suffix in suffixes.items() if suffix.lower() in VIDEO_SUFFIXES and not is_folder[name]]
    files.sort(
        key=lambda name: (VIDEO_SUFFIXES.index(suffixes[name].lower()), suffixes[name] != suffixes[name].lower())
    )
    found = {name: name for name in files}
    for name in files:
        stem = PurePath(name).stem
        found.setdefault(stem + suffixes[name].lower(), name)
        found.setdefault(stem, name)
    every = {name: name for name in is_folder if is_folder[name]} | found
    return {_composed(called): name for called, name in every.items()} | every


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)

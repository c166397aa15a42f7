"""Files in folders that others had in their hands: written without following links, read within bounds."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MOST_BYTES = 64 << 20
"""Of a settings file or a template: more is taken for an attack on the memory. Weights may have any size."""
WEIGHTS = (".safetensors", ".bin")
READ = (*WEIGHTS, ".json", ".jinja", ".txt", ".model")
"""Suffixes of what is read of a checkpoint's folder."""


def own_folder(path: Path, *, may_be_link: bool = False) -> Path:
    """A folder to write into: a new one that only this user may read, or one that is there and is this user's.

    may_be_link: a link of this user's to such a folder will do. Raises ValueError for any other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = [path.lstat(), *([path.stat()] if may_be_link else [])]
        if not stat.S_ISDIR(found[-1].st_mode):
            raise ValueError(f"{path}: is a link or a file, where a folder is written; remove it") from None
        if any(each.st_uid != os.geteuid() for each in found):
            raise ValueError(
                f"{path}: belongs to another user, who could change what is in it; choose another"
            ) from None
    return path


def remove_any(path: Path) -> None:
    """Delete what has this name, if anything: of a link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def fresh_folder(path: Path) -> Path:
    """A new, empty folder in place of whatever had its name."""
    remove_any(path)
    path.mkdir(parents=True)
    return path


@contextmanager
def os_errors_of_safetensors() -> Iterator[None]:
    """A full disk is an OSError inside, as in all other writing."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step: a reader or a crash never sees half of it, and no link is followed."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def open_to_append(path: Path) -> TextIO:
    """Open a file to add to its end. Raises OSError for a link, and ValueError for what has other names too."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o666), "a")
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        file.close()
        raise ValueError(f"{path}: is a hard link or no regular file, and is not added to; remove it")
    return file


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """What a file holds. Raises ValueError naming one of over `most` bytes, a folder, a pipe or a device; OSError."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, and a file is expected")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise ValueError(f"{path}: cannot be read: no regular file of at most {most >> 20} MiB")
        return file.read(most)


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError naming one that is too large, nested too deep or no JSON; OSError."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: malformed JSON ({error})") from error


def check_files(folder: Path) -> None:
    """Raise ValueError naming a file that a checkpoint's folder should not hold: from elsewhere, endless, no file.

    Links lead to files in the folder, or in `blobs` of the hub's cache that it is a snapshot in. A text with a second
    name (a hard link) may be anyone's, and would be written into the checkpoints made from this one.
    """
    home = folder.resolve()
    homes = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
    for path in sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in READ):
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(each) for each in homes):
            raise ValueError(f"{path}: is a link that leads out of its folder, and is not read")
        found = os.stat(real)
        is_text = path.suffix not in WEIGHTS
        if not stat.S_ISREG(found.st_mode) or (is_text and (found.st_nlink > 1 or found.st_size > MOST_BYTES)):
            raise ValueError(f"{path}: is a hard link, no regular file or larger than {MOST_BYTES >> 20} MiB")
        if path.suffix == ".json":
            read_json(real)


def escaped(text: object) -> str:
    """A text as a terminal may show it: what does not print escaped, but for the ends of lines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def one_line(error: object) -> str:
    """An error as a terminal may show it, on one line."""
    return escaped(" ".join(str(error).split()))


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return escaped(super().getMessage())


def log_printably() -> None:
    """From now on every log line of this process, of any library, is as a terminal may show it."""
    logging.setLogRecordFactory(_PrintableRecord)

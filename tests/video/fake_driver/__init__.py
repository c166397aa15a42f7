"""A libcuda and a libnvcuvid for machines without a GPU: device memory is the host's, libavcodec decodes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

from tempsamp_fast import _video

SOURCES = Path(__file__).parent
OPEN_THINGS = ("decoders", "parsers", "events", "contexts", "pushed", "left_mapped", "races")
"""Counts that are 0 when everything that was opened is closed."""


class FakeDriver:
    """The two libraries, and the table of numbers (`fake.h`) that sets what they do and counts what is done."""

    def __init__(self, folder: Path) -> None:
        self.libcuda, self.libnvcuvid = folder / "libfakecuda.so", folder / "libfakenvcuvid.so"
        self._table = ctypes.CDLL(str(self.libcuda))
        self._table.fake_get.restype = ctypes.c_long
        self._table.fake_set.argtypes = (ctypes.c_char_p, ctypes.c_long)

    def open(self) -> _video.Nvdec:
        return _video.Nvdec(0, libcuda=str(self.libcuda), libnvcuvid=str(self.libnvcuvid))

    def __setitem__(self, name: str, value: int) -> None:
        self._table.fake_set(name.encode(), value)

    def __getitem__(self, name: str) -> int:
        return self._table.fake_get(name.encode())

    def reset(self) -> None:
        self._table.fake_reset()


def build(cache: Path) -> FakeDriver:
    """Compile the libraries, unless `cache` has them from these sources."""
    sources = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]*")))
    folder = cache / hashlib.sha256(sources).hexdigest()[:12]
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}_{os.getpid()}")
        draft.mkdir(parents=True)
        _compile("cuda.cpp", draft / "libfakecuda.so")
        packages = ["pkg-config", "--cflags", "--libs", "libavcodec", "libavutil", "ffnvcodec"]
        flags = subprocess.run(packages, check=True, capture_output=True, text=True).stdout.split()
        _compile("nvcuvid.cpp", draft / "libfakenvcuvid.so", *flags, f"-L{draft}", "-lfakecuda", "-Wl,-rpath,$ORIGIN")
        draft.rename(folder)
    return FakeDriver(folder)


def _compile(source: str, library: Path, *flags: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", str(SOURCES / source), "-o", str(library)]
    subprocess.run([*command, *flags], check=True)

"""What the FFmpeg that torchcodec has loaded can tell and torchcodec does not: the format of a file, and complaints.

A decoder that makes up a picture, and a demuxer that passes over a hole, say so in FFmpeg's log and nowhere else.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

MOST_PROBED, WEAK_SCORE = 1 << 20, 25
"""Bytes after which FFmpeg takes any guess at the format, and the score that it doubts before."""
ERROR_LEVEL, INFO_LEVEL = 16, 32
"""AV_LOG_ERROR and AV_LOG_INFO."""
CONCEALED = b"concealing"
"""How an H.264 or MPEG decoder begins to say, as a mere information, that it makes up part of a picture."""
LINE_BYTES = 256


class _ProbeData(ctypes.Structure):
    """FFmpeg's AVProbeData."""

    _fields_ = (
        ("filename", ctypes.c_char_p),
        ("buf", ctypes.c_char_p),
        ("buf_size", ctypes.c_int),
        ("mime_type", ctypes.c_char_p),
    )


@cache
def _ffmpeg() -> ctypes.CDLL:
    """torchcodec's core, whose symbols are found in the FFmpeg that it is linked to."""
    return ctypes.CDLL(re.findall(r"/\S*libtorchcodec_core\S*", Path("/proc/self/maps").read_text())[0])


def probed_format(path: Path, head: bytes) -> str:
    """The format that FFmpeg will take a file for that begins with `head`, by its own probe; empty for none.

    As avformat_open_input: first by the name alone (image sequences), then by more and more of the file.
    """
    probe = _ffmpeg().av_probe_input_format3
    probe.restype = ctypes.POINTER(ctypes.c_char_p)  # AVInputFormat begins with its name
    sizes = [0, *(1 << bits for bits in range(11, MOST_PROBED.bit_length()))]
    for size in sizes:
        part, score = head[:size], ctypes.c_int()
        data = _ProbeData(bytes(path.absolute()), part + bytes(64), len(part), None)
        found = probe(ctypes.byref(data), int(size > 0), ctypes.byref(score))
        if found and score.value > (WEAK_SCORE if 0 < size < len(head) else 0):
            return found[0].decode()
    return ""


class _Listeners(threading.local):
    complaints: list[str] | None = None


_here = _Listeners()
_lock = threading.Lock()
_num_listening = 0


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def _hear(source: int | None, level: int, form: int | None, arguments: int | None) -> None:
    """FFmpeg's log callback, on the thread that decodes."""
    if level > INFO_LEVEL or _here.complaints is None or _here.complaints:
        return
    if level > ERROR_LEVEL and not (form and ctypes.string_at(form).startswith(CONCEALED)):
        return
    line, prefix = ctypes.create_string_buffer(LINE_BYTES), ctypes.c_int(0)
    words = [ctypes.c_void_p(part) for part in (form, arguments)]
    render = _ffmpeg().av_log_format_line2
    render(ctypes.c_void_p(source), level, *words, line, LINE_BYTES, ctypes.byref(prefix))
    _here.complaints.append(line.value.decode(errors="replace").strip())


@contextmanager
def listening() -> Iterator[list[str]]:
    """A list that gets the first error that FFmpeg logs on this thread inside the block."""
    global _num_listening
    library = _ffmpeg()
    outer, _here.complaints = _here.complaints, []
    with _lock:
        _num_listening += 1
        library.av_log_set_callback(_hear)
    try:
        yield _here.complaints
    finally:
        _here.complaints = outer
        with _lock:
            _num_listening -= 1
            if _num_listening == 0:
                library.av_log_set_callback(library.av_log_default_callback)

"""Matroska whose sound comes several frames to a block (lacing, RFC 9559 section 10.3): ffmpeg's muxer never laces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

SEGMENT, CLUSTER, SIMPLE_BLOCK = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75", b"\xa3"
PLACES = b"\x11\x4d\x9b\x74", b"\x1c\x53\xbb\x6b"
"""Elements that say where others are: the seek head and the cues."""
SOUND_TRACK = 2
FRAMES_PER_BLOCK = 6

Lacing = Literal["xiph", "fixed", "ebml"]
FLAGS: dict[Lacing, int] = {"xiph": 0b010, "fixed": 0b100, "ebml": 0b110}


def elements(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(identifier, content) one after another; one of unknown size goes on to the end."""
    at = 0
    while at < len(data):
        id_bytes = 9 - data[at].bit_length()
        size_bytes = 9 - data[at + id_bytes].bit_length()
        begin = at + id_bytes + size_bytes
        unknown = (1 << 7 * size_bytes) - 1
        size = int.from_bytes(data[at + id_bytes : begin], "big") & unknown
        end = len(data) if size == unknown else begin + size
        yield data[at : at + id_bytes], data[begin:end]
        at = end


def element(identifier: bytes, content: bytes) -> bytes:
    return identifier + b"\x01" + len(content).to_bytes(7, "big") + content


def sizes(frames: list[bytes], lacing: Lacing) -> bytes:
    """Of all frames but the last, as the lacing writes them."""
    lengths = [len(frame) for frame in frames]
    if lacing == "fixed":
        assert len(set(lengths)) == 1, "frames of one size"
        return b""
    if lacing == "xiph":
        return b"".join(b"\xff" * (length // 255) + bytes([length % 255]) for length in lengths[:-1])
    steps = [after - before + 0x1FFF for before, after in pairwise(lengths[:-1])]
    return b"".join((0x4000 | value).to_bytes(2, "big") for value in [lengths[0], *steps])


def block(blocks: list[bytes], lacing: Lacing) -> bytes:
    """The frames of several blocks without lacing in one, which begins with the first."""
    head, frames = blocks[0][:4], [content[4:] for content in blocks]
    head = head[:3] + bytes([head[3] | FLAGS[lacing], len(frames) - 1])
    return element(SIMPLE_BLOCK, head + sizes(frames, lacing) + b"".join(frames))


def laced_cluster(content: bytes, lacing: Lacing) -> bytes:
    out, waiting = b"", []
    for identifier, part in elements(content):
        is_sound = identifier == SIMPLE_BLOCK and part[0] == 0x80 | SOUND_TRACK
        if is_sound and (not waiting or lacing != "fixed" or len(part) == len(waiting[0])):
            waiting.append(part)
        else:
            out += element(identifier, part)
        if len(waiting) == FRAMES_PER_BLOCK:
            out, waiting = out + block(waiting, lacing), []
    return out + (block(waiting, lacing) if waiting else b"")


def laced(data: bytes, lacing: Lacing) -> bytes:
    """A file of video (track 1) and sound (track 2) with its sound laced, and without cues."""
    out = b""
    for identifier, content in elements(data):
        if identifier == SEGMENT:
            parts = [(name, part) for name, part in elements(content) if name not in PLACES]
            content = b"".join(element(n, laced_cluster(part, lacing) if n == CLUSTER else part) for n, part in parts)
        out += element(identifier, content)
    return out

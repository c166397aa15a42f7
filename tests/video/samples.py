"""MP4 files with the tables of their samples rewritten: no muxer at hand makes such."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


@dataclass(frozen=True)
class Codec:
    """What the headers of its units say."""

    shift: int
    mask: int
    """Of the first byte: the kind of a unit."""
    slices: range
    headers: range
    filler: int
    header_bytes: int

    def kind(self, byte: int) -> int:
        return byte >> self.shift & self.mask


CODECS = {
    b"avcC": Codec(0, 31, range(1, 6), range(6, 14), 12, 1),
    b"hvcC": Codec(1, 63, range(32), range(32, 41), 38, 2),
}
"""By the record that an MP4 has of them."""


def body_of(data: bytes, name: bytes) -> bytes:
    """What the first such box of the last track holds, behind version and flags."""
    at = data.rindex(name) - 4
    (size,) = struct.unpack_from(">I", data, at)
    return data[at + 12 : at + size]


def with_body(data: bytes, name: bytes, body: bytes, parents: tuple[bytes, ...] = PARENTS) -> bytes:
    """The file with another body in this box, which stands behind the pictures, as do the boxes around it."""
    at = data.rindex(name) - 4
    (size,) = struct.unpack_from(">I", data, at)
    changed = bytearray(data)
    for parent in parents:
        begin = data.rindex(parent, 0, at) - 4
        struct.pack_into(">I", changed, begin, struct.unpack_from(">I", data, begin)[0] + 12 + len(body) - size)
    box = struct.pack(">I", 12 + len(body)) + data[at + 4 : at + 12] + body
    return bytes(changed[:at]) + box + bytes(changed[at + size :])


def rows(body: bytes, columns: int) -> np.ndarray:
    """A table of 32-bit numbers behind their count, [rows, columns] int64."""
    return np.frombuffer(body[4:], ">u4").astype(np.int64).reshape(-1, columns)


def table(values: np.ndarray) -> bytes:
    return struct.pack(">I", len(values)) + values.astype(">u4").tobytes()


@dataclass(frozen=True)
class Samples:
    """Where the samples of the last track are."""

    codec: Codec
    sizes: np.ndarray
    per_chunk: np.ndarray
    positions: np.ndarray


def samples_of(data: bytes) -> Samples:
    sizes = rows(body_of(data, b"stsz")[4:], 1)[:, 0]
    offsets = rows(body_of(data, b"stco"), 1)[:, 0]
    runs = rows(body_of(data, b"stsc"), 3)
    per_chunk = np.repeat(runs[:, 1], np.diff(np.append(runs[:, 0], len(offsets) + 1)))
    before = np.append(0, sizes.cumsum())[:-1]
    first = np.append(0, per_chunk.cumsum())[:-1]
    chunk = np.repeat(np.arange(len(offsets)), per_chunk)
    codec = next(codec for name, codec in CODECS.items() if name in data)
    return Samples(codec, sizes, per_chunk, offsets[chunk] + before - before[first][chunk])


def units(data: bytes | bytearray, begin: int, size: int) -> Iterator[int]:
    """Where the units of a sample begin, behind their lengths."""
    at = begin
    while at < begin + size:
        yield at + 4
        at += 4 + int.from_bytes(data[at : at + 4], "big")


def on_later_slice(share: float, change: Callable[[bytearray, int, Codec], None]) -> Callable[[bytearray], bytearray]:
    """`change` on the slice at `share` of those that are not the first of their picture: their address is not 0."""

    def operation(data: bytearray) -> bytearray:
        samples = samples_of(bytes(data))
        codec = samples.codec
        later = [
            at
            for begin, size in zip(samples.positions.tolist(), samples.sizes.tolist(), strict=True)
            for at in units(data, begin, size)
            if codec.kind(data[at]) in codec.slices and data[at + codec.header_bytes] < 0x80
        ]
        change(data, later[int(len(later) * share)], codec)
        return data

    return operation


def without_slice(share: float) -> Callable[[bytearray], bytearray]:
    """An MP4 where part of a picture has become filler."""

    def change(data: bytearray, at: int, codec: Codec) -> None:
        data[at] = codec.filler << codec.shift

    return on_later_slice(share, change)


def with_two_first_slices(share: float) -> Callable[[bytearray], bytearray]:
    """An MP4 where a later slice claims to be the first of its picture."""

    def change(data: bytearray, at: int, codec: Codec) -> None:
        data[at + codec.header_bytes] |= 0x80

    return on_later_slice(share, change)


def headers_apart(data: bytearray) -> bytes:
    """The parameter sets and messages of each picture as a sample of their own, half a frame before it."""
    whole = bytes(data)
    samples = samples_of(whole)
    sizes, codec = samples.sizes, samples.codec
    heads = np.array([
        next(at for at in units(whole, begin, size) if codec.kind(whole[at]) not in codec.headers) - 4 - begin
        for begin, size in zip(samples.positions.tolist(), sizes.tolist(), strict=True)
    ])  # fmt: skip
    is_split = heads > 0
    assert is_split.any()
    pieces = 1 + is_split
    last = pieces.cumsum() - 1  # the sample of each picture
    new_sizes = np.repeat(sizes, pieces)
    new_sizes[last] -= heads
    new_sizes[last[is_split] - 1] = heads[is_split]
    durations = np.repeat(*rows(body_of(whole, b"stts"), 2).T[::-1])
    new_durations = np.repeat(durations, pieces)
    new_durations[last[is_split]] //= 2
    new_durations[last[is_split] - 1] -= new_durations[last[is_split]]
    num_chunks = len(samples.per_chunk)
    chunk_of = np.repeat(np.arange(num_chunks), samples.per_chunk)
    chunks = np.stack([np.arange(num_chunks) + 1, np.bincount(chunk_of, pieces), np.ones(num_chunks)], axis=1)
    tables = {
        b"stts": np.stack([np.ones_like(new_durations), new_durations], axis=1),
        b"stsc": chunks,
    }
    if b"stss" in whole:
        tables[b"stss"] = last[rows(body_of(whole, b"stss"), 1)[:, 0] - 1] + 1
    if b"ctts" in whole:
        offsets = np.repeat(*rows(body_of(whole, b"ctts"), 2).T[::-1])
        tables[b"ctts"] = np.stack([np.ones_like(new_sizes), np.repeat(offsets, pieces)], axis=1)
    whole = with_body(whole, b"stsz", bytes(4) + table(new_sizes))
    for name, values in tables.items():
        whole = with_body(whole, name, table(values))
    return whole

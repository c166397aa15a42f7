"""H.264 whose frames are coded as pairs of field pictures (PAFF), written bit by bit: no encoder at hand makes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

FRAMES_PER_IDR = 10
REFERENCE, UNUSED = 3, 0
SLICE, IDR_SLICE, SPS, PPS = 1, 5, 7, 8
INTRA_SLICE, INTRA_PCM = 7, 25


def flags(*values: int) -> str:
    return "".join(map(str, values))


def fixed(value: int, bits: int) -> str:
    return format(value, f"0{bits}b")


def golomb(value: int) -> str:
    """Exp-Golomb code ue(v) of H.264 9.1; a signed zero is the same bit."""
    digits = format(value + 1, "b")
    return "0" * (len(digits) - 1) + digits


def nal(kind: int, reference: int, bits: str, payload: bytes = b"") -> bytes:
    """A NAL unit: header, `bits` (zero-padded before `payload`), `payload`, stop bit; no start code within."""
    bits = bits + "0" * (-len(bits) % 8) if payload else bits + "1"
    bits += "0" * (-len(bits) % 8)
    body = int(bits, 2).to_bytes(len(bits) // 8, "big") + payload + (b"\x80" if payload else b"")
    return b"\0\0\0\1" + bytes([reference << 5 | kind]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", body)


def parameter_sets(width: int, height: int) -> bytes:
    """Main profile, 16 frame numbers, 256 picture order counts, not frames only, no adaptive coding of macroblocks."""
    sps = fixed(77, 8) + fixed(0, 8) + fixed(30, 8) + golomb(0) + golomb(0) + golomb(0) + golomb(4) + golomb(1)
    sps += flags(0) + golomb(width // 16 - 1) + golomb(height // 32 - 1) + flags(0, 0, 1, 0, 0)
    pps = golomb(0) + golomb(0) + flags(0, 0) + golomb(0) * 3 + flags(0, 0, 0) + golomb(0) * 3 + flags(1, 0, 0)
    return nal(SPS, REFERENCE, sps) + nal(PPS, REFERENCE, pps)


def macroblocks(luma: np.ndarray) -> Iterator[bytes]:
    """Samples of [height, width] uint8 in macroblocks of 16 x 16, with grey chroma."""
    height, width = luma.shape
    for block in luma.reshape(height // 16, 16, width // 16, 16).swapaxes(1, 2).reshape(-1, 256):
        yield block.tobytes() + b"\x80" * 128


def field(number: int, is_bottom: bool, luma: np.ndarray) -> bytes:
    """One field of frame `number`, every macroblock as it is. Odd frames are no references."""
    place = number % FRAMES_PER_IDR
    is_idr = place == 0 and not is_bottom
    reference = REFERENCE if place % 2 == 0 else UNUSED
    header = golomb(0) + golomb(INTRA_SLICE) + golomb(0) + fixed((place + 1) // 2, 4) + flags(1, int(is_bottom))
    header += golomb(number // FRAMES_PER_IDR % 2) if is_idr else ""
    header += fixed(2 * place + is_bottom, 8)
    header += flags(0, 0) if is_idr else flags(0) if reference else ""
    header += golomb(0) + golomb(1)
    first, *rest = macroblocks(luma)
    head = header + golomb(INTRA_PCM)
    more = golomb(INTRA_PCM) + "0" * (8 - len(golomb(INTRA_PCM)) % 8)
    between = int(more, 2).to_bytes(len(more) // 8, "big")
    return nal(IDR_SLICE if is_idr else SLICE, reference, head, first + b"".join(between + block for block in rest))


def field_pictures(frames: np.ndarray) -> bytes:
    """[n, height, width] uint8 luma, sides multiples of 32 and 16 -> an H.264 byte stream."""
    _, height, width = frames.shape
    stream = [parameter_sets(width, height)]
    for number, frame in enumerate(frames):
        stream += [field(number, is_bottom, frame[int(is_bottom) :: 2]) for is_bottom in (False, True)]
    return b"".join(stream)

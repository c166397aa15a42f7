"""Cases of what users' files do: joined, cut, packed, mislabelled, beside other streams; and their healthy look-alikes.

Each kind in several codecs and containers. What ffmpeg's muxers set right is set wrong by surgery on the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path

from tests.video.corpus import (
    AAC,
    H264,
    HEVC,
    MADE_FROM_H264,
    NO_REORDERING,
    TONE,
    VP9,
    Case,
    cut,
    encoded,
    ffmpeg,
    joined,
    remuxed,
    words,
)
from tests.video.lacing import Lacing, laced
from tests.video.samples import headers_apart, with_two_first_slices, without_slice

MPEG4 = words("-c:v mpeg4 -q:v 3 -g 25 -pix_fmt yuv420p")
MPEG2 = words("-c:v mpeg2video -bf 2 -q:v 3 -pix_fmt yuv420p")
MSMPEG4 = words("-c:v msmpeg4v2 -q:v 3 -g 25 -pix_fmt yuv420p")
THEORA = words("-c:v libtheora -q:v 7 -g 32 -pix_fmt yuv420p")
XVID = words("-c:v libxvid -bf 2 -g 25 -q:v 3 -pix_fmt yuv420p")
INTERLACED = [*MPEG4, *words("-bf 2 -g 12 -flags +ildct+ilme")]
VC2 = words("-c:v vc2 -strict experimental -pix_fmt yuv420p")
ONE_GOP = [*H264, "-g", "250", "-x264-params", "b-pyramid=normal:b-adapt=0"]
PICTURES = words("-q:v 3 -pix_fmt yuvj420p")
NOISE = ("-f", "lavfi", "-i", "anoisesrc=r=48000:d=6")
HOURS = "setpts=N*3600/TB"
FALSE_TIMES = ("-bsf:v", "setts=pts=DTS")
NEXT = 150
"""First number of a clip to be joined to another."""
FEW = 40
SLICED = (280, 112)
GRAIN = "noise=c0s=30:c0f=t:all_seed=1"
"""Nothing that is made up looks like it."""

Surgery = Callable[[bytearray], bytes | bytearray]


def replaced(old: bytes, new: bytes) -> Surgery:
    """The first occurrence of `old`, which must be there, as long as it was."""

    def operation(data: bytearray) -> bytes:
        assert len(old) == len(new) and old in data
        return bytes(data).replace(old, new, 1)

    return operation


def patched(after: bytes, skip: int, format: str, *values: float) -> Surgery:
    """Values written over what stands `skip` bytes behind the first `after`."""

    def operation(data: bytearray) -> bytearray:
        struct.pack_into(format, data, data.index(after) + len(after) + skip, *values)
        return data

    return operation


def with_tail(tail: bytes) -> Surgery:
    return lambda data: data + tail


def all_keys_in_list(data: bytearray) -> bytearray:
    """An AVI whose list of chunks takes every picture for a key."""
    begin = data.rindex(b"idx1") + 8
    for at in range(begin, len(data) - 15, 16):
        data[at + 4] |= 0x10
    return data


def without_last_sample(data: bytearray) -> bytearray:
    """An MP4 whose last sample is empty."""
    at = data.index(b"stsz") + 12
    (count,) = struct.unpack_from(">I", data, at)
    struct.pack_into(">I", data, at + 4 * count, 0)
    return data


def without_order(data: bytearray) -> bytes:
    """H.264 in MP4 without the part of its parameter set that tells how many pictures wait for earlier ones."""
    record = data.index(b"avcC") + 4
    (length,) = struct.unpack_from(">H", data, record + 6)
    begin = record + 9  # behind the NAL header
    nal = bytes(data[begin : begin + length - 1])
    bits = "".join(f"{byte:08b}" for byte in nal.replace(b"\0\0\3", b"\0\0"))
    at = 24  # profile, constraints, level

    def golomb() -> int:
        nonlocal at
        zeros = bits.index("1", at) - at
        at += 2 * zeros + 1
        return int(bits[at - zeros - 1 : at], 2) - 1

    golomb()
    if nal[0] >= 100:
        assert golomb() == 1
        golomb(), golomb()
        at += 2
    golomb()
    assert golomb() == 0
    golomb(), golomb()
    at += 1
    golomb(), golomb()
    at += 2  # frames only, direct inference
    if bits[at] == "1":
        at += 1
        golomb(), golomb(), golomb(), golomb()
    else:
        at += 1
    assert bits[at] == "1", "a parameter set with usability information"
    stripped = bits[:at] + "01"
    stripped += "0" * (-len(stripped) % 8)
    rest = int(stripped, 2).to_bytes(len(stripped) // 8, "big")
    # As long as before; zeros behind the stop bit say nothing.
    data[begin : begin + length - 1] = rest + b"\0" * (length - 1 - len(rest))
    return bytes(data)


def sound_laced(lacing: Lacing) -> Surgery:
    return lambda data: laced(bytes(data), lacing)


def without_sound(data: bytearray) -> bytearray:
    """An MP4 whose second track lies behind the end of the file."""
    at = data.rindex(b"stco") + 8
    (count,) = struct.unpack_from(">I", data, at)
    struct.pack_into(f">{count}I", data, at + 4, *range(1 << 30, (1 << 30) + count))
    return data


def edited(*edits: tuple[int, int]) -> Surgery:
    """An MP4 that shows its track's (milliseconds, from this time in its own ticks; -1: nothing) one after another."""

    def operation(data: bytearray) -> bytes:
        at = data.index(b"elst") - 4
        (size,) = struct.unpack_from(">I", data, at)
        rows = b"".join(struct.pack(">Iii", duration, begin, 1 << 16) for duration, begin in edits)
        box = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
        for parent in (b"moov", b"trak", b"edts"):
            begin = data.rindex(parent, 0, at) - 4
            struct.pack_into(">I", data, begin, struct.unpack_from(">I", data, begin)[0] + len(box) - size)
        return bytes(data[:at]) + box + bytes(data[at + size :])

    return operation


def segments(base: str, *arguments: str):
    """Builder: cut into transport streams of a second, as for HTTP Live Streaming, and joined again."""

    def build(path: Path) -> None:
        pattern = path.with_name(f"{path.stem}_%d.ts")
        split = ["-f", "segment", "-segment_format", "mpegts", "-segment_time", "1"]
        ffmpeg("-i", path.with_name(base), "-c", "copy", *arguments, *split, pattern)
        parts = sorted(path.parent.glob(f"{path.stem}_*.ts"), key=lambda part: int(part.stem.rsplit("_", 1)[1]))
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()

    return build


def turned(degrees: float) -> Surgery:
    """The display matrix of an MP4's track at an angle that is no quarter turn."""
    sine, cosine = (round(65536 * f(math.radians(degrees))) for f in (math.sin, math.cos))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    matrix = struct.pack(">9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30)

    def operation(data: bytearray) -> bytearray:
        at = data.index(identity, data.index(b"tkhd"))
        data[at : at + len(matrix)] = matrix
        return data

    return operation


ENCRYPTED = words("-encryption_scheme cenc-aes-ctr -encryption_key 76a6c65c5ea762046bd749a2e632ccbb "
                  "-encryption_kid a7e61c373e219033c21091fa607bf3b8")  # fmt: skip

PARTS = {
    "next.mkv": encoded(*H264, first=NEXT),
    "next.ts": remuxed("next.mkv"),
    "vp9_next.webm": encoded(*VP9, first=NEXT),
    "hevc_next.ts": encoded(*HEVC, first=NEXT),
    "mpeg2_next.mpg": encoded(*MPEG2, first=NEXT),
    "mpeg2_next.mkv": encoded(*MPEG2, first=NEXT),
    "starts_late.ts": remuxed(MADE_FROM_H264, "-output_ts_offset", "1000"),
    "msmpeg4.avi": encoded(*MSMPEG4),
    "mpeg4_mp4.mp4": encoded(*MPEG4),
    "vp9_mp4.mp4": remuxed("vp9.webm"),
    "all_keys_h264.mp4": cut(MADE_FROM_H264, replaced(b"stss", b"free")),
    "hevc_open_gop.mp4": remuxed("hevc_open_gop.mkv"),
    "xvid.avi": encoded(*XVID),
    "packed.mp4": remuxed("xvid.avi"),
    "false_times.mp4": remuxed(MADE_FROM_H264, *FALSE_TIMES),
    "false_times.mkv": remuxed("hevc.mp4", *FALSE_TIMES),
    "false_times_mpeg2.mkv": remuxed("mpeg2_next.mkv", *FALSE_TIMES),
    "theora.ogv": encoded(*THEORA),
    "theora_next.ogv": encoded(*THEORA, first=NEXT),
    "theora_half.ogv": encoded(*THEORA, size=(140, 28)),
    "joined_sizes.ogv": joined("theora.ogv", "theora_half.ogv"),
    "with_mp3.mkv": remuxed("hevc.mp4", *words("-c:a libmp3lame"), more_inputs=TONE),
    "with_sound.mp4": remuxed(MADE_FROM_H264, *AAC, more_inputs=TONE),
    "pictures.webp": encoded("-c:v", "libwebp_anim", num_frames=FEW),
    "slices.mp4": encoded(*H264, "-x264-params", "slices=4", vf=GRAIN),
    "slices_hevc.mp4": encoded(*HEVC[:-1], HEVC[-1] + ":slices=3:ctu=16:min-cu-size=8", size=SLICED, vf=GRAIN),
    "slices.mkv": remuxed("slices.mp4"),
    "slices_hevc.ts": remuxed("slices_hevc.mp4"),
    "delimited.mp4": remuxed("h264.ts"),
    "delimited_hevc.mp4": remuxed("hevc.ts"),
    "delimited_fields.mp4": remuxed("h264_fields.ts"),
    "one_gop.mp4": encoded(*ONE_GOP, num_frames=FEW),
}
"""What the cases are made of, besides the corpus."""

USER_CASES = [
    # Sound beside the pictures.
    Case("sound_ac3.mkv", remuxed(MADE_FROM_H264, *words("-ac 2 -c:a ac3 -b:a 448k"), more_inputs=NOISE)),
    Case("sound_eac3.mkv", remuxed("hevc.mp4", *words("-ac 2 -c:a eac3 -b:a 640k"), more_inputs=NOISE)),
    Case("sound_pcm.mkv", remuxed("vp9.webm", *words("-ac 2 -c:a pcm_s24le"), more_inputs=NOISE)),
    Case("sound_live.mkv", remuxed("sound_ac3.mkv", "-live", "1")),
    Case("sound_flac.mkv", remuxed("mpeg2_next.mkv", *words("-ac 2 -c:a flac"), more_inputs=NOISE)),
    Case("sound_laced_xiph.mkv", cut("with_mp3.mkv", sound_laced("xiph"))),
    Case("sound_laced_ebml.mkv", cut("with_mp3.mkv", sound_laced("ebml"))),
    Case("sound_laced_fixed.mkv", cut("sound_pcm.mkv", sound_laced("fixed"))),
    Case("sound_lost.mp4", cut("with_sound.mp4", without_sound)),
    # Containers that mark every packet as a key.
    Case("all_keys.avi", cut("msmpeg4.avi", all_keys_in_list)),
    Case("all_keys.asf", remuxed("all_keys.avi")),
    Case("all_keys_mpeg4.mp4", cut("mpeg4_mp4.mp4", replaced(b"stss", b"free"))),
    Case("all_keys_mpeg4.mkv", remuxed("all_keys_mpeg4.mp4")),
    Case("all_keys_vp9.mp4", cut("vp9_mp4.mp4", replaced(b"stss", b"free"))),
    Case("all_keys_h264.mkv", remuxed("all_keys_h264.mp4")),
    # A clock that starts again, or that goes round.
    Case("joined.mkv", joined("h264.mkv", "next.mkv")),
    Case("joined.webm", joined("vp9.webm", "vp9_next.webm")),
    Case("joined.ts", joined("h264.ts", "next.ts")),
    Case("joined_hevc.ts", joined("hevc.ts", "hevc_next.ts")),
    Case("joined.mpg", joined("mpeg2.mpg", "mpeg2_next.mpg")),
    Case("joined.ogv", joined("theora.ogv", "theora_next.ogv")),
    Case("joined_back.ts", joined("starts_late.ts", "next.ts")),
    # B-frames packed behind other frames.
    Case("packed.avi", remuxed("xvid.avi")),
    Case("packed_all_b.avi", encoded(*XVID, "-bf", "1", "-g", "100")),
    Case("packed_with_sound.avi", remuxed("packed.avi", *words("-c:a mp2"), more_inputs=TONE)),
    # Segments of one stream.
    Case("segments_h264.ts", segments(MADE_FROM_H264)),
    Case("segments_hevc.ts", segments("hevc.mp4")),
    Case("segments_mpeg2.ts", segments("mpeg2.mpg")),
    Case("segments_with_sound.ts", segments("video_after_audio.mp4")),
    # H.264 that does not say how far its pictures are out of order.
    Case("no_order.mp4", cut("one_gop.mp4", without_order)),
    Case("no_order.mkv", remuxed("no_order.mp4")),
    Case("no_order.ts", remuxed("no_order.mp4")),
    Case("no_order.flv", remuxed("no_order.mp4")),
    # Open GOPs cut by copying.
    Case("cut_open_gop.mkv", remuxed("h264_open_gop.mp4", before=("-ss", "1.7"))),
    Case("cut_open_gop_hevc.mkv", remuxed("hevc_open_gop.mp4", before=("-ss", "3.3"))),
    Case("cut_open_gop_hevc.mp4", remuxed("hevc_open_gop.mkv", before=("-ss", "3.3"))),
    Case("cut_open_gop_mpeg2.mkv", remuxed("mpeg2_next.mkv", before=("-ss", "2.5"))),
    # Edits, and cuts inside a GOP.
    Case("edits_two.mp4", cut(MADE_FROM_H264, edited((2000, 1536), (2000, 40960)))),
    Case("edits_back.mp4", cut(MADE_FROM_H264, edited((2000, 40960), (2000, 5120)))),
    Case("edits_pause.mp4", cut("hevc.mp4", edited((1000, -1), (2000, 15360)))),
    Case("no_first_key.mkv", remuxed(MADE_FROM_H264, *words("-copyinkf -ss 1.75"))),
    Case("no_first_key.mp4", remuxed(MADE_FROM_H264, *words("-copyinkf -ss 1.75"))),
    # Pictures of which slices are missing, or come twice; and whole ones of several slices.
    Case("slices_whole.ts", remuxed("slices.mp4")),
    Case("slices_whole_hevc.mkv", remuxed("slices_hevc.mp4"), size=SLICED),
    Case("lost_slice.mp4", cut("slices.mp4", without_slice(0.3)), "damaged", ("DAMAGED",), pristine="slices.mp4"),
    Case("lost_slice_of_key.mp4", cut("slices.mp4", without_slice(0.0)), "damaged", ("DAMAGED",),
         pristine="slices.mp4"),
    Case("lost_slice.mkv", remuxed("lost_slice.mp4"), "damaged", ("DAMAGED",), pristine="slices.mkv"),
    Case("lost_slice_hevc.mp4", cut("slices_hevc.mp4", without_slice(0.1)), "damaged", ("DAMAGED",),
         pristine="slices_hevc.mp4", size=SLICED),
    Case("lost_slice_hevc.ts", remuxed("lost_slice_hevc.mp4"), "damaged", ("DAMAGED",), pristine="slices_hevc.ts",
         size=SLICED),
    Case("lost_last_slice_hevc.mp4", cut("slices_hevc.mp4", without_slice(0.999)), "damaged", ("DAMAGED", "TRUNCATED"),
         pristine="slices_hevc.mp4", size=SLICED),
    Case("two_first_slices.mp4", cut("slices.mp4", with_two_first_slices(0.5)), "damaged", ("DAMAGED",),
         pristine="slices.mp4"),
    Case("two_first_slices_hevc.mp4", cut("slices_hevc.mp4", with_two_first_slices(0.5)), "damaged", ("DAMAGED",),
         pristine="slices_hevc.mp4", size=SLICED),
    # Parameter sets and messages that are samples of their own.
    Case("headers_apart.mp4", cut("delimited.mp4", headers_apart)),
    Case("headers_apart_of_keys.mp4", cut(MADE_FROM_H264, headers_apart)),
    Case("headers_apart.mkv", remuxed("headers_apart.mp4")),
    Case("headers_apart_fragments.mp4", remuxed("headers_apart.mp4", "-movflags", "frag_keyframe+empty_moov")),
    Case("headers_apart_hevc.mp4", cut("delimited_hevc.mp4", headers_apart)),
    Case("headers_apart_hevc.mov", remuxed("headers_apart_hevc.mp4")),
    Case("headers_apart_fields.mp4", cut("delimited_fields.mp4", headers_apart), size=(288, 64)),
    # Headers and first pictures that what follows needs, or that are packets without a picture.
    Case("mpeg4_interlaced.mkv", encoded(*INTERLACED, size=(280, 64)), size=(280, 64)),
    Case("mpeg4_interlaced.mp4", remuxed("mpeg4_interlaced.mkv"), size=(280, 64)),
    Case("mpeg4_interlaced.ts", remuxed("mpeg4_interlaced.mkv", "-bsf:v", "dump_extra"), size=(280, 64)),
    Case("vc2.ts", encoded(*VC2, num_frames=FEW)),
    Case("vc2.mkv", encoded(*VC2, num_frames=FEW)),
    # Files that seem to end early and do not.
    Case("empty_sample.mp4", cut("h264_faststart.mp4", without_last_sample)),
    Case("empty_sample_hevc.mp4", cut("hevc.mp4", without_last_sample)),
    Case("long_duration.mkv", cut("h264.mkv", patched(b"\x44\x89\x88", 0, ">d", 60000.0))),
    Case("long_duration.webm", cut("vp9.webm", patched(b"\x44\x89\x88", 0, ">d", 60000.0))),
    Case("longer_sound.mkv", remuxed(MADE_FROM_H264, *AAC, more_inputs=("-f", "lavfi", "-i", "sine=duration=9"))),
    Case("stray_text.ts", cut("h264.ts", with_tail(b"not a packet " * 3))),
    Case("stray_zeros.ts", cut("hevc.ts", with_tail(b"\0" * 1000))),
    Case("stray_text.mkv", cut("h264.mkv", with_tail(b"not an element" * 9))),
    # Headers with another size, and files that nobody can decode.
    Case("false_size.mp4", cut(MADE_FROM_H264, patched(b"avc1\0\0\0\0\0\0\0\1", 16, ">HH", 280, 280))),
    Case("false_size.mkv", cut("vp9.webm", patched(b"\xba\x81", 0, ">B", 120))),
    Case("false_size.avi", cut("mjpeg.avi", patched(b"strf", 12, "<i", 64))),
    Case("encrypted.mp4", remuxed(MADE_FROM_H264, *ENCRYPTED), "refused", ("UNSUPPORTED",)),
    Case("encrypted_hevc.mp4", remuxed("hevc.mp4", *ENCRYPTED), "refused", ("UNSUPPORTED",)),
    Case("unknown_codec.mp4", cut(MADE_FROM_H264, replaced(b"avc1\0\0\0\0", b"vvz1\0\0\0\0")), "refused",
         ("UNSUPPORTED",)),
    # What else users open.
    Case("pictures.apng", encoded("-f", "apng", num_frames=FEW)),
    Case("pictures.gif", encoded("-f", "gif", num_frames=FEW)),
    Case("pictures.mjpeg", encoded("-c:v", "mjpeg", *PICTURES, "-f", "mjpeg", num_frames=FEW)),
    Case("one_frame.mp4", encoded(*H264, num_frames=1)),
    Case("one_frame.gif", encoded("-f", "gif", num_frames=1)),
    Case("one_frame.mkv", encoded(*VP9, num_frames=1)),
    Case("frame_an_hour.mp4", encoded(*H264, vf=HOURS, num_frames=FEW)),
    Case("frame_an_hour.mkv", encoded(*NO_REORDERING, vf=HOURS, num_frames=FEW)),
]  # fmt: skip

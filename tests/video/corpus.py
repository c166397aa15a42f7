"""Videos that carry their own frame numbers, most of them awkward or broken, made with the ffmpeg command line.

Every frame shows its number as ten luma blocks (5 x 2, most significant first), so that a decoder's answer can be
checked without trusting any decoder's idea of indices.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tests.video.fields import field_pictures

NUM_FRAMES = 150
FPS = 25
WIDTH, HEIGHT = 280, 56
DARK, LIGHT = 40, 215
COLUMNS, ROWS = 5, 2


def words(arguments: str) -> list[str]:
    return arguments.split()


H264 = words("-c:v libx264 -preset veryfast -bf 3 -b_strategy 0 -g 40 -pix_fmt yuv420p")
HEVC = words("-c:v libx265 -preset veryfast -pix_fmt yuv420p -x265-params log-level=none:keyint=40:bframes=4")
AV1 = words("-c:v libsvtav1 -preset 12 -pix_fmt yuv420p")
VP9 = words("-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 40 -b:v 200k -pix_fmt yuv420p")

Expectation = Literal["exact", "damaged", "refused"]
"""`exact`: every frame; `damaged`: what the command line still decodes right, the rest flagged; `refused`: a code."""


@dataclass(frozen=True)
class Case:
    """One file of the corpus."""

    name: str
    build: Callable[[Path], object]
    expect: Expectation = "exact"
    codes: tuple[str, ...] = ()
    """Codes that are right for a `refused` file, and for a `damaged` one where its damage can be told."""
    pristine: str = ""
    """The whole file that a `damaged` one was made of."""
    size: tuple[int, int] = (WIDTH, HEIGHT)
    """(width, height) as shown."""
    is_counted: bool = False
    """A `damaged` file without presentation times: the number of a frame tells its place, and its time."""
    loses_count: bool = False
    """A counted file where a picture is gone for good, so that no place after it is known."""


def draw(numbers: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """[n] int -> [n, height, width] uint8 frames that show them."""
    bits = (numbers[:, None] >> np.arange(COLUMNS * ROWS - 1, -1, -1)) & 1
    blocks = np.where(bits, LIGHT, DARK).astype(np.uint8).reshape(-1, ROWS, COLUMNS)
    rows = np.arange(height) * ROWS // height
    columns = np.arange(width) * COLUMNS // width
    return blocks[:, rows[:, None], columns[None]]


def read(frames: np.ndarray) -> list[int]:
    """[n, height, width] luma, or [n, 3, height, width] -> the numbers the frames show; -1 where a block is neither
    dark nor light.
    """
    height, width = frames.shape[-2:]
    middles = [
        frames[..., _middle(row, ROWS, height), _middle(column, COLUMNS, width)].reshape(len(frames), -1).mean(axis=1)
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    levels = np.stack(middles, axis=1)
    numbers = (levels > (DARK + LIGHT) / 2) @ (1 << np.arange(COLUMNS * ROWS - 1, -1, -1))
    unclear = np.abs(levels - (DARK + LIGHT) / 2).min(axis=1) < (LIGHT - DARK) / 8
    return np.where(unclear, -1, numbers).tolist()


def _middle(block: int, blocks: int, length: int) -> slice:
    """The inner third of a block, at least its middle pixel."""
    begin, end = -(-block * length // blocks), -(-(block + 1) * length // blocks)
    centre, reach = (begin + end - 1) // 2, length // blocks // 6
    return slice(centre - reach, centre + reach + 1)


def ffmpeg(*arguments: str | Path, data: bytes | None = None) -> bytes:
    """Run the command line; its standard output. CalledProcessError with its messages when it fails."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, input=data, stdin=None if data is not None else subprocess.DEVNULL,
                          capture_output=True, check=True).stdout  # fmt: skip


def command_line_frames(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What ffmpeg's command line decodes: times [n] in seconds (NaN where it has none), and luma [n, height, width]."""
    width, height = size
    scale = f"scale={width}:{height}:out_range=full,format=gray,showinfo"
    command = ["ffmpeg", "-nostdin", "-copyts", "-threads", "1", "-i", str(path), "-vf", scale]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-"]
    done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width)
    stamps = re.findall(rb"showinfo.* n: *\d+ .*?pts_time:(\S+)", done.stderr)
    times = np.array([np.nan if stamp == b"NOPTS" else float(stamp) for stamp in stamps])
    return times[: len(frames)], frames


def key_flags(path: Path) -> list[bool]:
    """Whether each frame is a key frame, in order of presentation."""
    what = ["-select_streams", "v:0", "-show_entries", "frame=key_frame", "-of", "csv=p=0"]
    listed = subprocess.run(["ffprobe", "-v", "error", *what, path], capture_output=True, check=True, text=True).stdout
    return [flag == "1" for flag in listed.replace(",", " ").split()]


def encoded(
    *arguments: str, size: tuple[int, int] = (WIDTH, HEIGHT), first: int = 0, num_frames: int = NUM_FRAMES, vf: str = ""
):
    """Builder: frames numbered from `first` on through an encoder."""

    def build(path: Path) -> None:
        raw = draw(np.arange(first, first + num_frames), *size).tobytes()
        source = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{size[0]}x{size[1]}", "-r", str(FPS), "-i", "-"]
        picture = ",".join(filter(None, ["scale=in_range=full:out_range=limited", vf]))
        ffmpeg(*source, "-vf", picture, "-fps_mode", "passthrough", *arguments, path, data=raw)

    return build


def fields(path: Path) -> None:
    """Numbered frames as field pictures, in a raw stream."""
    path.write_bytes(field_pictures(draw(np.arange(NUM_FRAMES), 288, 64)))


def remuxed(base: str, *arguments: str, before: tuple[str, ...] = (), more_inputs: tuple[str, ...] = ()):
    """Builder: the packets of another file of the corpus in a new container."""

    def build(path: Path) -> None:
        ffmpeg(*before, "-i", path.with_name(base), *more_inputs, "-c", "copy", *arguments, path)

    return build


def cut(base: str, operation: Callable[[bytearray], bytes | bytearray]):
    """Builder: the bytes of another file after surgery."""

    def build(path: Path) -> None:
        path.write_bytes(operation(bytearray(path.with_name(base).read_bytes())))

    return build


def through_pipe(base: str, container: str):
    """Builder: muxed to a pipe, so that nothing can be written back: no duration, no cues."""

    def build(path: Path) -> None:
        path.write_bytes(ffmpeg("-i", path.with_name(base), "-c", "copy", "-f", container, "-"))

    return build


def first_part(share: float) -> Callable[[bytearray], bytearray]:
    return lambda data: data[: int(len(data) * share)]


def scribbled(share: float, length: int, value: int | None = None) -> Callable[[bytearray], bytearray]:
    """Overwrite `length` bytes at `share` of the file with one value, or with noise."""

    def operation(data: bytearray) -> bytearray:
        noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
        at = int(len(data) * share)
        data[at : at + length] = noise if value is None else bytes([value]) * length
        return data

    return operation


def overwritten(at: int) -> Callable[[bytearray], bytearray]:
    """Two bytes of 255, which cost a picture its header and leave the packets as they are."""
    return lambda data: data[:at] + b"\xff\xff" + data[at + 2 :]


def without_chunk(number: int) -> Callable[[bytearray], bytes]:
    """An AVI where the header of a video chunk is destroyed: a picture is gone before any decoder sees it."""

    def operation(data: bytearray) -> bytes:
        at = [found.start() for found in re.finditer(rb"00dc", data)][number]
        return bytes(data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :])

    return operation


def without_start_code(number: int, is_reference: bool) -> Callable[[bytearray], bytes]:
    """A raw H.264 stream where the start code of a P- or B-picture is destroyed: it ends up inside the one before."""

    def operation(data: bytearray) -> bytes:
        slices = [found.end() for found in re.finditer(rb"\x00\x00\x01(?=[\x01\x21\x41\x61])", data)]
        at = [at for at in slices if (data[at] > 1) == is_reference][number]
        return bytes(data[: at - 1] + b"\xff" + data[at:])

    return operation


def without_packets(data: bytearray) -> bytes:
    """A transport stream that lost 3 video packets in a row, three times."""
    packets = [bytes(data[at : at + 188]) for at in range(0, len(data) - 187, 188)]
    lost = {at + step for at in (len(packets) // 3, len(packets) // 2, len(packets) * 3 // 4) for step in range(3)}
    return b"".join(packet for at, packet in enumerate(packets) if at not in lost)


def without_first_key(data: bytearray) -> bytes:
    """A transport stream joined in the middle of its first GOP: tables kept, video from the fifth frame on."""
    packets = [bytes(data[at : at + 188]) for at in range(0, len(data) - 187, 188)]
    starts = [at for at, packet in enumerate(packets) if packet[1] & 0x40 and (packet[1] & 0x1F, packet[2]) == (1, 0)]
    return b"".join(packets[: starts[0]] + packets[starts[4] :])


def joined(*bases: str):
    """Builder: byte-wise concatenation."""
    return lambda path: path.write_bytes(b"".join(path.with_name(base).read_bytes() for base in bases))


def text(content: str):
    return lambda path: path.write_text(content)


def rotated(degrees: int, transpose: str):
    """Builder: coded turned, with a display matrix that turns it back."""

    def build(path: Path) -> None:
        coded = path.with_name(f"coded_{path.name}")
        encoded(*H264, vf=transpose)(coded)
        ffmpeg("-i", coded, "-c", "copy", "-metadata:s:v:0", f"rotate={degrees}", path)
        coded.unlink()

    return build


TONE = ("-f", "lavfi", "-i", "sine=duration=6")
AAC = ("-c:a", "aac")
COVER = ("-f", "lavfi", "-i", "color=red:s=64x64:d=0.04")
MADE_FROM_H264 = "h264.mp4"
HUGE = words("-f lavfi -i color=gray:s=8192x8192:r=25 -frames:v 3 -c:v libx264 -preset ultrafast -coder 1 -threads 1")
VARIABLE = "setpts='(N+if(gt(N,40),N-40,0)+0.5*mod(N,2))/25/TB'"
HOUR_GAP = "setpts='(N/25+if(gte(N,75),3600,0))/TB'"
NO_REORDERING = words("-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 0")

CASES = [
    Case("h264.mp4", encoded(*H264)),
    Case("h264_long_gop.mp4", encoded(*H264, "-g", "250")),
    Case("h264_open_gop.mp4", encoded(*H264, "-x264-params", "open-gop=1:keyint=15:min-keyint=15:scenecut=0")),
    Case("h264_pyramid.mp4", encoded(*H264, "-bf", "7", "-x264-params", "b-pyramid=normal:b-adapt=0")),
    Case("h264_intra_refresh.mkv", encoded(*H264, "-bf", "0", "-x264-params", "intra-refresh=1:keyint=40")),
    Case("h264_interlaced.mp4", encoded(*H264, "-flags", "+ildct+ilme", size=(280, 64)), size=(280, 64)),
    Case("h264_fields.h264", fields, size=(288, 64)),
    Case("h264_fields.mp4", remuxed("h264_fields.h264"), size=(288, 64)),
    Case("h264_fields.ts", remuxed("h264_fields.h264"), size=(288, 64)),
    Case("h264_422_10bit.mp4", encoded(*H264, "-pix_fmt", "yuv422p10le")),
    Case("h264_444_odd.mp4", encoded(*H264, "-pix_fmt", "yuv444p", size=(281, 57)), size=(281, 57)),
    Case("h264_16x16.mp4", encoded(*H264, "-crf", "10", size=(16, 16)), size=(16, 16)),
    Case("h264.mkv", remuxed(MADE_FROM_H264)),
    Case("h264_no_cues.mkv", through_pipe(MADE_FROM_H264, "matroska")),
    Case("h264.ts", remuxed(MADE_FROM_H264)),
    Case("h264_zero_start.ts", remuxed(MADE_FROM_H264, "-muxdelay", "0", "-muxpreload", "0")),
    Case("h264_clock_wraps.ts", remuxed(MADE_FROM_H264, "-output_ts_offset", "95440")),
    Case("h264_no_first_key.ts", cut("h264.ts", without_first_key), "damaged", pristine="h264.ts"),
    Case("h264_open_gop.ts", remuxed("h264_open_gop.mp4")),
    Case("h264.avi", remuxed(MADE_FROM_H264)),
    Case("h264.flv", remuxed(MADE_FROM_H264)),
    Case("h264.h264", remuxed(MADE_FROM_H264)),
    Case("h264_fragments.mp4", remuxed(MADE_FROM_H264, "-movflags", "frag_keyframe+empty_moov")),
    Case("h264_faststart.mp4", remuxed(MADE_FROM_H264, "-movflags", "faststart")),
    Case("h264_no_edit_list.mp4", remuxed(MADE_FROM_H264, "-use_editlist", "0")),
    Case("edit_list_mid_gop.mp4", remuxed(MADE_FROM_H264, before=("-ss", "2.5"))),
    Case("edit_list_empty_start.mp4", remuxed(MADE_FROM_H264, "-output_ts_offset", "1.5")),
    Case("starts_late.mkv", remuxed(MADE_FROM_H264, "-output_ts_offset", "8.33")),
    Case("video_after_audio.mp4", remuxed(MADE_FROM_H264, *AAC, before=("-itsoffset", "1.5"), more_inputs=TONE)),
    Case("variable_rate.mp4", encoded(*H264, vf=VARIABLE)),
    Case("variable_rate.webm", encoded(*VP9, vf=VARIABLE)),
    Case("hour_gap.mp4", encoded(*H264, vf=HOUR_GAP)),
    Case("duplicate_pts.mkv", encoded(*NO_REORDERING, "-bsf:v", "setts=pts=floor(N/2)*80:dts=floor(N/2)*80")),
    Case("hevc.mp4", encoded(*HEVC, "-tag:v", "hvc1")),
    Case("hevc_open_gop.mkv", encoded(*HEVC[:-1], HEVC[-1] + ":open-gop=1")),
    Case("hevc_10bit.mp4", encoded(*HEVC, "-pix_fmt", "yuv420p10le")),
    Case("hevc.ts", remuxed("hevc.mp4")),
    Case("hevc.hevc", remuxed("hevc.mp4")),
    Case("vp9.webm", encoded(*VP9)),
    Case("vp9_alt_ref.webm", encoded(*VP9, "-deadline", "good", "-auto-alt-ref", "1", "-lag-in-frames", "16")),
    Case("vp9_odd.webm", encoded(*VP9, size=(281, 57)), size=(281, 57)),
    Case("vp9_no_cues.webm", through_pipe("vp9.webm", "webm")),
    Case("vp8.webm", encoded("-c:v", "libvpx", "-deadline", "realtime", "-b:v", "400k", "-pix_fmt", "yuv420p")),
    Case("av1.mp4", encoded(*AV1, size=(280, 64)), size=(280, 64)),
    Case("av1.mkv", remuxed("av1.mp4"), size=(280, 64)),
    Case("mpeg4_b_frames.avi", encoded("-c:v", "mpeg4", "-bf", "2", "-q:v", "3", "-pix_fmt", "yuv420p")),
    Case("mpeg2.mpg", encoded("-c:v", "mpeg2video", "-bf", "2", "-q:v", "3", "-pix_fmt", "yuv420p")),
    Case("mjpeg.avi", encoded("-c:v", "mjpeg", "-q:v", "3", "-pix_fmt", "yuvj420p")),
    Case("rotated_90.mp4", rotated(90, "transpose=clock")),
    Case("rotated_180.mp4", rotated(180, "hflip,vflip")),
    Case("rotated_270.mp4", rotated(270, "transpose=cclock")),
    Case("cover_art.mp4", remuxed(MADE_FROM_H264, "-map", "1", "-map", "0", "-disposition:v:0", "attached_pic",
                                  "-c:v:0", "png", more_inputs=COVER)),
    Case("two_videos.mkv", remuxed(MADE_FROM_H264, "-map", "1", "-map", "0", "-c:v:0", "mpeg4", more_inputs=COVER)),
    Case("half.h264", encoded(*H264, size=(140, 28))),
    Case("size_change.h264", joined("h264.h264", "half.h264")),
    Case("truncated.mp4", cut("h264_faststart.mp4", first_part(0.6)), "damaged", pristine="h264_faststart.mp4"),
    Case("cut_fragments.mp4", cut("h264_fragments.mp4", first_part(0.6)), "damaged", pristine="h264_fragments.mp4"),
    Case("truncated.mkv", cut("h264.mkv", first_part(0.6)), "damaged", pristine="h264.mkv"),
    Case("truncated.ts", cut("h264.ts", first_part(0.61)), "damaged", ("TRUNCATED",), pristine="h264.ts"),
    Case("garbage.mp4", cut("h264_faststart.mp4", scribbled(0.5, 1500)), "damaged", pristine="h264_faststart.mp4"),
    Case("garbage.webm", cut("vp9.webm", scribbled(0.5, 1500)), "damaged", pristine="vp9.webm"),
    Case("zeroed.mkv", cut("h264.mkv", scribbled(0.5, 3000, 0)), "damaged", pristine="h264.mkv"),
    Case("garbage_hevc.mkv", cut("hevc_open_gop.mkv", scribbled(0.5, 1500)), "damaged", pristine="hevc_open_gop.mkv"),
    Case("lost_frame.h264", cut("h264.h264", overwritten(5703)), "damaged", pristine="h264.h264", is_counted=True),
    Case("lost_frame.avi", cut("h264.avi", overwritten(11091)), "damaged", pristine="h264.avi", is_counted=True),
    Case("lost_frame_mpeg4.avi", cut("mpeg4_b_frames.avi", overwritten(11736)), "damaged",
         pristine="mpeg4_b_frames.avi", is_counted=True),
    Case("lost_chunk.avi", cut("h264.avi", without_chunk(75)), "damaged", pristine="h264.avi", is_counted=True,
         loses_count=True),
    Case("lost_picture.h264", cut("h264.h264", without_start_code(30, is_reference=False)), "damaged",
         pristine="h264.h264", is_counted=True, loses_count=True),
    Case("lost_reference.h264", cut("h264.h264", without_start_code(20, is_reference=True)), "damaged",
         pristine="h264.h264", is_counted=True, loses_count=True),
    Case("lost_chunk_mpeg4.avi", cut("mpeg4_b_frames.avi", without_chunk(75)), "damaged",
         pristine="mpeg4_b_frames.avi", is_counted=True, loses_count=True),
    Case("lost_packets.ts", cut("h264.ts", without_packets), "damaged", pristine="h264.ts"),
    Case("no_moov.mp4", cut("h264.mp4", first_part(0.6)), "refused", ("OPEN_FAILED",)),
    Case("empty.mp4", text(""), "refused", ("OPEN_FAILED",)),
    Case("prose.mp4", text("Not a video.\n" * 99), "refused", ("OPEN_FAILED",)),
    Case("playlist.m3u8", text("#EXTM3U\n#EXTINF:6,\nh264.ts\n#EXT-X-ENDLIST\n"), "refused", ("OPEN_FAILED",)),
    Case("playlist.mp4", text("#EXTM3U\n#EXTINF:6,\nh264.ts\n#EXT-X-ENDLIST\n"), "refused", ("OPEN_FAILED",)),
    Case("script.mp4", text("ffconcat version 1.0\nfile h264.mp4\n"), "refused", ("OPEN_FAILED",)),
    Case("pipe.mp4", os.mkfifo, "refused", ("OPEN_FAILED",)),
    Case("folder.mp4", Path.mkdir, "refused", ("OPEN_FAILED",)),
    Case("missing.mp4", lambda path: None, "refused", ("NOT_FOUND",)),
    Case("thin.mkv", encoded(*NO_REORDERING, size=(3000, 8), num_frames=8), "refused", ("BAD_GEOMETRY",)),
    Case("sound.mp4", lambda path: ffmpeg(*TONE, path), "refused", ("NO_VIDEO_STREAM",)),
    Case("sound_with_cover.mp4", lambda path: ffmpeg(*TONE, *COVER, "-map", "0", "-map", "1", "-c:v", "png",
         "-disposition:v:0", "attached_pic", path), "refused", ("NO_VIDEO_STREAM", "TOO_FEW_FRAMES")),
    Case("bomb.mp4", lambda path: ffmpeg(*HUGE, path), "refused", ("LIMIT_EXCEEDED",)),
]  # fmt: skip


def build_corpus(
    folder: Path, cases: Sequence[Case] = CASES, parts: Mapping[str, Callable[[Path], object]] | None = None
) -> None:
    """Write every file that is not there yet, after the `parts` that some are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in [*(parts or {}).items(), *((case.name, case.build) for case in cases)]:
        if not (folder / name).exists():
            build(folder / name)

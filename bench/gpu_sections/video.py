"""What the GPU's hardware decoders offer, and surfaces and uint8 patches to model-ready patches on the GPU."""

from __future__ import annotations

import ctypes
from functools import partial

import torch

from bench.gpu_sections.child import Record
from bench.gpu_sections.timing import in_turn
from tempsamp_fast.video import Geometry, normalise_rows
from tempsamp_fast.video.nv12 import Colour, surfaces_to_patches
from tempsamp_fast.video.patches import patchify, resize_frames
from tests.video.test_nv12 import random_surfaces, rgb

CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}
"""cudaVideoCodec of the video codec SDK."""
CHROMA_420 = 1
SIZES = ((360, 640), (720, 1280), (1080, 1920))
NUM_FRAMES = 64


class DecodeCaps(ctypes.Structure):
    """CUVIDDECODECAPS of the video codec SDK."""

    _fields_ = (
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bit_depth_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_engines", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("histogram", ctypes.c_ubyte * 4),
        ("reserved3", ctypes.c_uint * 10),
    )


def measure(record: Record) -> None:
    with record.attempt("hardware decoders"):
        measure_decoders(record)
    geometry = Geometry.of_family("qwen2_5_vl")
    with record.attempt("normalise"):
        measure_normalise(record, geometry)
    for height, width in SIZES:
        with record.attempt(f"surfaces {height}p"):
            measure_surfaces(record, geometry, height, width)


def measure_decoders(record: Record) -> None:
    try:
        library = ctypes.CDLL("libnvcuvid.so.1")
    except OSError as error:
        record.add("hardware decoders", found=f"none: {error}")
        return
    torch.zeros(1, device="cuda")  # the query needs a current context
    for name, codec in CODECS.items():
        for bits in (8, 10):
            caps = DecodeCaps(codec=codec, chroma=CHROMA_420, bit_depth_minus_8=bits - 8)
            status = library.cuvidGetDecoderCaps(ctypes.byref(caps))
            record.add(
                f"decoder {name} {bits}-bit",
                status=status,
                supported=bool(caps.is_supported),
                engines=caps.num_engines,
                smallest=[caps.min_width, caps.min_height],
                largest=[caps.max_width, caps.max_height],
            )


def measure_normalise(record: Record, geometry: Geometry) -> None:
    """uint8 rows to bf16, as they come from the decoder threads or the patch cache."""
    rows = torch.randint(0, 256, (2**18, geometry.row_width), dtype=torch.uint8)
    on_gpu = rows.cuda()
    expected = normalise_rows(rows[:4096], geometry, torch.bfloat16)
    assert torch.equal(normalise_rows(on_gpu[:4096], geometry, torch.bfloat16).cpu(), expected)
    target = torch.empty_like(on_gpu)
    runs = {
        "normalise_rows": (partial(normalise_rows, on_gpu, geometry, torch.bfloat16), 3 * rows.numel()),
        "device copy": (partial(target.copy_, on_gpu), 2 * rows.numel()),
    }
    for name, figures in in_turn({name: run for name, (run, _) in runs.items()}).items():
        record.add(f"rows, {name}", **figures, gb_per_s=runs[name][1] / figures["ms"] / 1e6)


def measure_surfaces(record: Record, geometry: Geometry, height: int, width: int) -> None:
    """Random NV12 frames to bf16 patches, bit-equal to the CPU path; bytes are the frames' and the patches'."""
    colour, frame_size = Colour(), geometry.frame_size(NUM_FRAMES, height, width)
    surfaces = random_surfaces(NUM_FRAMES, height, width, pitch=-(-width // 256) * 256)
    few = surfaces[:2]
    expected = patchify(resize_frames(rgb(few, height, width, colour), frame_size), geometry)
    convert = partial(
        surfaces_to_patches,
        height=height,
        width=width,
        geometry=geometry,
        frame_size=frame_size,
        dtype=torch.bfloat16,
        colour=colour,
    )
    actual = convert(few.cuda()).cpu()
    assert torch.equal(actual, normalise_rows(expected, geometry, torch.bfloat16)), "bits differ from the CPU path"
    on_gpu = surfaces.cuda()
    target = torch.empty_like(on_gpu)
    num_patches = convert(on_gpu).shape[0]
    moved = NUM_FRAMES * height * width * 3 // 2 + 2 * num_patches * geometry.row_width
    times = in_turn({"patches": lambda: convert(on_gpu), "copy": lambda: target.copy_(on_gpu)})
    copy_rate = 2 * on_gpu.numel() / times["copy"]["ms"]
    record.add(
        f"surfaces {height}p to {frame_size[0]}x{frame_size[1]}",
        **times["patches"],
        gb_per_s=moved / times["patches"]["ms"] / 1e6,
        frames_per_s=1e3 * NUM_FRAMES / times["patches"]["ms"],
        share_of_copy_bandwidth=moved / times["patches"]["ms"] / copy_rate,
    )

"""Folders of numbered images (`000001.jpg`, ...) as videos; their frame rate is in `fps.txt` there or one folder up."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.system.files import read_bytes
from tempsamp_fast.video import Geometry, Limits, Sampling, VideoError, VideoResult, frames
from tempsamp_fast.video.backend import why_no_extension
from tempsamp_fast.video.patches import patchify, resize_frames
from tempsamp_fast.video.probe import header_facts, indexed_facts
from tempsamp_fast.video.sampling import FRAME_FACTOR, frames_on_screen, sample_indices, sample_times

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""What such a file may be inside: Pillow would read any of its formats, whatever the suffix."""


def load_frame_folder(folder: Path, sampling: Sampling, geometry: Geometry) -> VideoPatches:
    """The patches (uint8) that a file of these frames would give. Raises VideoError naming the folder and the flaw."""
    images, fps = images_of(folder), fps_of(folder)
    if sampling.mode == "pts":
        times_s, second_per_frame = sample_times(sampling, len(images), len(images) / fps)
        indices = frames_on_screen(times_s, np.arange(len(images)) / fps)
    else:
        indices, second_per_frame = sample_indices(sampling, len(images), fps)
    if len(indices) < FRAME_FACTOR:
        raise VideoError(folder, "TOO_FEW_FRAMES", f"gives {len(indices)} frames for {sampling}")
    height, width = _picture(folder, images[indices[0]]).shape[1:]
    try:
        size = geometry.frame_size(len(indices), height, width)
    except ValueError as error:
        raise VideoError(folder, "BAD_GEOMETRY", str(error)) from error
    Limits().check(folder, height * width, len(images), 3 * size[0] * size[1] * len(indices))
    resized = []
    for index in indices:
        picture = _picture(folder, images[index])
        if picture.shape[1:] != (height, width):
            raise VideoError(folder, "DAMAGED", f"{images[index].name} is not {width} x {height} as the first image")
        resized.append(resize_frames(picture[None], size))
    frame_times_s, grid_thw = torch.from_numpy(indices / fps), geometry.grid_thw(len(indices), size)
    taken = VideoResult(folder, "ok", "OK", num_frames=len(indices), frame_times_s=frame_times_s)
    return VideoPatches(
        patchify(torch.cat(resized), geometry),
        grid_thw,
        geometry.temporal_patch_size * second_per_frame,
        taken.timestamps_s(geometry.temporal_patch_size),
    )


def duration_of(video: Path) -> float:
    """Seconds that a file or a folder of frames lasts. Raises VideoError."""
    if video.is_dir():
        return len(images_of(video)) / fps_of(video)
    return (header_facts if why_no_extension() else indexed_facts)(video).duration_s


def thumbnails(video: Path | str, times_s: Sequence[float], height: int) -> Tensor:
    """As `tempsamp_fast.video.frames`, of a file or of a folder of frames."""
    folder = Path(video)
    if not folder.is_dir():
        return frames(video, times_s, height)
    images, fps = images_of(folder), fps_of(folder)
    shown = frames_on_screen(np.asarray(times_s, dtype=np.float64), np.arange(len(images)) / fps)
    pictures = [_picture(folder, images[index])[None] for index in shown]
    return torch.cat([resize_frames(p, (height, max(1, round(p.shape[3] * height / p.shape[2])))) for p in pictures])


def images_of(folder: Path) -> list[Path]:
    """The images in the order of the last number in their names, which leaves none out."""
    numbered: dict[int, Path] = {}
    for path in folder.iterdir():
        number = re.search(r"(\d+)\D*\Z", path.stem, re.ASCII)
        if path.suffix.lower() in IMAGE_SUFFIXES and number and not path.name.startswith("."):
            first = numbered.setdefault(int(number[1]), path)
            if first != path:
                raise VideoError(folder, "UNSUPPORTED", f"{first.name} and {path.name} have the same number")
    numbers = sorted(numbered)
    if len(numbers) < FRAME_FACTOR:
        raise VideoError(folder, "TOO_FEW_FRAMES", f"has {len(numbers)} numbered images ({', '.join(IMAGE_SUFFIXES)})")
    if gaps := [number for number in range(numbers[0], numbers[0] + len(numbers)) if number not in numbered]:
        raise VideoError(folder, "UNSUPPORTED", f"has no image of the number {gaps[0]}")
    return [numbered[number] for number in numbers]


def fps_of(folder: Path) -> float:
    """Images per second, as a number or as a fraction (`30000/1001`)."""
    for path in (folder / "fps.txt", folder.parent / "fps.txt"):
        if path.is_file():
            try:
                parts = [float(part) for part in read_bytes(path).decode("utf-8-sig").split("/")]
                fps = parts[0] / parts[1] if len(parts) == 2 else parts[0] if len(parts) == 1 else math.nan
            except (ValueError, ZeroDivisionError):
                fps = math.nan
            if not 1e-4 <= fps <= 1e4:
                raise VideoError(folder, "UNSUPPORTED", f"{path} does not hold one number, from 0.0001 to 10000")
            return fps
    raise VideoError(folder, "UNSUPPORTED", "a folder of frames needs its frame rate: write it into fps.txt there")


def _picture(folder: Path, path: Path) -> Tensor:
    """[3, height, width] uint8."""
    try:
        with Image.open(io.BytesIO(read_bytes(path)), formats=FORMATS) as image:
            Limits().check(path, image.height * image.width, 1, 3 * image.height * image.width)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except VideoError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(folder, "DECODE_FAILED", f"{path.name} cannot be read ({str(error)[:90]})") from error

"""Where patches are wanted, and whether a GPU's hardware decoders can make them there."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from tempsamp_fast.video.backend import why_no_extension

if TYPE_CHECKING:
    from tempsamp_fast._video import Nvdec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A device for patches and what decodes on it."""

    device: torch.device
    decoders: Nvdec | None = None
    """Its hardware decoders; None: the CPU decodes."""
    reason: str = ""
    """Why the CPU decodes, where a GPU was to be used."""


def find_target(device: str) -> Target:
    """The target of a `device` argument; what is not to be had is logged once, with the reason.

    Raises ValueError for a device that is neither of the choices, and for a CUDA device that is not there.
    """
    kind, _, ordinal = device.partition(":")
    if device not in ("cpu", "auto") and (kind != "cuda" or (device != "cuda" and not ordinal.isdigit())):
        raise ValueError(f"device must be 'cpu', 'auto', 'cuda' or 'cuda:<number>', got {device!r}")
    if device == "cpu":
        return Target(torch.device("cpu"))
    if not torch.cuda.is_available():
        if device != "auto":
            raise ValueError(f"device={device!r}: there is no CUDA device; the choices are 'cpu' and 'auto'")
        return _without_cuda()
    number = int(ordinal) if ordinal else torch.cuda.current_device()
    if number >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} CUDA devices")
    return _with_cuda(torch.device("cuda", number))


@cache
def _without_cuda() -> Target:
    log.info("videos are decoded by the CPU: there is no CUDA device")
    return Target(torch.device("cpu"), reason="there is no CUDA device")


@cache
def _with_cuda(device: torch.device) -> Target:
    target = _open(device)
    if target.reason:
        log.warning("videos for %s are decoded by the CPU: %s", device, target.reason)
    return target


def _open(device: torch.device) -> Target:
    if trouble := why_no_extension():
        return Target(device, reason=trouble)
    from tempsamp_fast import _video

    try:
        decoders = _video.Nvdec(device.index)
    except RuntimeError as error:
        return Target(device, reason=str(error))
    if decoders.num_engines == 0:
        return Target(device, reason="this GPU has no hardware decoders")
    return Target(device, decoders)

"""`torch.cuda` of one pretended H100, whose clock is the simulated one and whose memory is the ledger's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bench.rehearsal.card import DEVICE, on_card, values
from bench.rehearsal.ledger import LEDGER, Work

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_045_870_592, multi_processor_count=132,
    L2_cache_size=50 << 20, warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10, is_integrated=0, is_multi_gpu_board=0, gcnArchName="", uuid="0",
)  # fmt: skip


class Stream:
    """All streams are one."""

    cuda_stream = 0
    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        LEDGER.wait("Stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """Remembers the simulated time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.at_s = LEDGER.seconds

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        LEDGER.wait("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return max(1e-6, 1e3 * (end.at_s - self.at_s))


class CUDAGraph:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded: list[tuple[str, Work]] = []

    def replay(self) -> None:
        LEDGER.replay(self.recorded)

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None: ...


@contextmanager
def graph(recording: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    """What is launched inside is recorded; what cannot be recorded becomes a violation."""
    LEDGER.capturing = []
    try:
        yield
    finally:
        recording.recorded, LEDGER.capturing = LEDGER.capturing, None


def pretend() -> None:
    """Put the doubles into torch."""
    cuda: Any = torch.cuda
    one_stream = Stream()
    answers = {
        "_lazy_init": None, "_lazy_call": None, "set_device": None, "empty_cache": None, "manual_seed": None,
        "manual_seed_all": None, "set_stream": None, "init": None, "ipc_collect": None,
        "is_initialized": True, "current_device": 0, "get_device_name": H100.name, "get_device_capability": (9, 0),
        "get_device_properties": H100, "is_bf16_supported": True, "current_stream": one_stream,
        "default_stream": one_stream,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    for name in ("device", "stream"):
        setattr(cuda, name, lambda *_, **__: nullcontext())
    for double in (Stream, Event, CUDAGraph, graph):
        setattr(cuda, double.__name__, double)
    cuda.synchronize = lambda device=None: LEDGER.wait("torch.cuda.synchronize")
    cuda.is_current_stream_capturing = lambda: LEDGER.capturing is not None
    cuda.memory_allocated = lambda device=None: LEDGER.live
    cuda.max_memory_allocated = cuda.memory_reserved = cuda.max_memory_reserved = lambda device=None: LEDGER.peak
    cuda.reset_peak_memory_stats = lambda device=None: setattr(LEDGER, "peak", LEDGER.live)
    cuda.mem_get_info = lambda device=None: (H100.total_memory - LEDGER.live, H100.total_memory)
    _patch_tensors()
    nn.Module._apply = _apply  # type: ignore[method-assign]
    torch.autograd.set_multithreading_enabled(False)  # the mode is of this thread


def _patch_tensors() -> None:
    """What of torch.Tensor goes past the dispatcher."""
    tolist = Tensor.tolist
    read = lambda self: tolist(self.cpu() if on_card(self) else self)
    Tensor.tolist = FakeTensor.tolist = read  # type: ignore[method-assign]
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    Tensor.pin_memory = _pinned  # type: ignore[method-assign]
    Tensor.is_pinned = lambda self, device=None: getattr(self, "is_pinned_double", False)  # type: ignore[method-assign]
    FakeTensor.__deepcopy__ = _deep_copy
    plain = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A list of tensors is read number by number, as torch does."""
        if isinstance(data, FakeTensor):
            data = values(data)
        return plain(_numbers(data), *args, **kwargs)

    torch.tensor = tensor


def _numbers(data: Any) -> Any:
    if isinstance(data, (list, tuple)):
        return [_numbers(each) for each in data]
    return data.item() if isinstance(data, FakeTensor) else data


def _pinned(self: Tensor, device: Any = None) -> Tensor:
    """Marked: a copy from there does not wait."""
    pinned = self.clone()
    pinned.is_pinned_double = True  # type: ignore[attr-defined]
    return pinned


def _deep_copy(self: FakeTensor, memo: dict[int, Any]) -> Any:
    if id(self) not in memo:
        memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
    return memo[id(self)]


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """As torch's, but putting new parameters in: the memory of fake ones cannot be swapped."""
    for child in self.children():
        _apply(child, function)
    for store in (self._parameters, self._buffers):
        for name, old in store.items():
            if old is None:
                continue
            with torch.no_grad():
                new = function(old)
            if new is old or (new.device == old.device and new.dtype == old.dtype):
                continue
            store[name] = nn.Parameter(new, old.requires_grad) if store is self._parameters else new
    return self

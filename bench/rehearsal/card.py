"""The pretended card: operations on CPU tensors run, those on `cuda:0` are worked out by shape and booked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from bench.rehearsal.costs import FREE, num_bytes, work_of
from bench.rehearsal.ledger import LEDGER, Work, inside, place

DEVICE = torch.device("cuda", 0)
MEMORY_OVER_BUS = 60.0
"""How many times faster the card's own memory is than the bus to the host."""
STAGED = 64 << 10
"""Bytes: the driver keeps as much of a copy from pageable memory aside; more waits for the device."""
KNOWN_INTEGERS, KNOWN_FLOATS = 1 << 18, 1 << 12
"""True values are kept of tensors with at most so many elements."""
PIXELS = 8 << 20
"""Bytes from which on float32 from the host is taken for pixels, which travel as uint8."""
COUNTED = {"nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
"""The size of the result depends on values."""
RANDOM = {"empty", "rand", "randn", "randint", "normal_", "uniform_", "random_", "exponential_", "bernoulli_"}
MIXED = {"mm", "bmm", "addmm", "baddbmm"}
"""Products that may be asked for in float32, of which torch 2.11 has no shapes."""
TRIAL = "groups_heads"
"""The trial of grouped heads, which repeats them to compare."""
ANSWERS = {"deepspeed/": 0.0, f" {TRIAL}": 0.0, " logp_gap": 0.0, "transformers/generation/": 0.0}
"""By part of the place: what a value reads as that nobody knows; elsewhere True, 1.0 or 0."""


def on_card(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.device.type == "cuda"


def known(tensor: Tensor) -> Tensor | None:
    """The true values of a tensor on the card, where they are known; on the CPU they are."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    found = getattr(tensor, "true_values", None)
    return found if found is not None and found.shape == tensor.shape else None  # `tensor.data` may have been set


def values(tensor: Tensor) -> Tensor:
    """A CPU tensor in place of one on the card, with what is known of it."""
    found = known(tensor)
    if found is not None:
        return found.clone()
    line = place()
    usual = 0.0 if tensor.dtype in (torch.int64, torch.int32, torch.uint8) else 1.0
    value = next((answer for part, answer in ANSWERS.items() if part in line), usual)
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape).clone()


class Card(TorchDispatchMode):
    """Inside, `cuda:0` is a card."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=False)
        self._fakes.static_shapes = True
        self._fakes.shape_env = None

    def __enter__(self) -> Any:
        fake_tensor.init_gpu_context = lambda device: None
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = tree_flatten((args, kwargs))[0]
        device = kwargs.get("device")
        goes_there = device is not None and torch.device(device).type == "cuda"
        if not goes_there and not any(map(on_card, flat)):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        special = getattr(self, f"_run_{name}", None)
        if special is not None and (done := special(func, args, kwargs)) is not None:
            return done
        if name in COUNTED or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return self._count(func, name, args, kwargs, flat)
        self._note_host_operands(name, args)
        if name == "_varlen_attn" and args[7] and args[0].shape[1] == args[1].shape[1] and not inside(TRIAL):
            LEDGER.violations.append(f"keys are repeated to all heads at {place()}")
        if name in MIXED and func._overloadname.startswith("dtype"):
            out = self._mixed_product(func, args, kwargs)
        else:
            out = self._shaped(func, args, kwargs)
        made = [each for each in tree_flatten(out)[0] if on_card(each)]
        for tensor in made:
            LEDGER.hold(tensor)
        is_view = func.is_view and not func._schema.is_mutable
        if name not in FREE and not is_view:
            written = [] if func._schema.is_mutable else made
            if any(tensor.numel() for tensor in made) or not made:
                LEDGER.launch(f"{name}", work_of(name, args, kwargs, written, known))
        self._remember(func, name, args, kwargs, flat, out, made)
        return out

    # What is carried over the bus.

    def _run__to_copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        source, device = args[0], kwargs.get("device")
        if isinstance(source, FakeTensor):
            if device is None or torch.device(device).type != "cpu":
                return None
            self._fetch(source)
            return values(source).to(kwargs.get("dtype") or source.dtype)
        self._send(source, kwargs.get("non_blocking", False))
        out = self._shaped(func, args, kwargs)
        self._set_known(out, source.to(out.dtype, copy=True))
        LEDGER.hold(out)
        return out

    def _run_copy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        if not isinstance(target, FakeTensor):
            self._fetch(source)
            return target.copy_(values(source))
        if not isinstance(source, FakeTensor):
            self._send(source, (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False))
        return None

    def _run__local_scalar_dense(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._fetch(args[0])
        return values(args[0]).item()

    def _run_equal(self, func: Any, args: Any, kwargs: Any) -> bool:
        LEDGER.wait("torch.equal")
        return True

    def _send(self, source: Tensor, non_blocking: bool) -> None:
        LEDGER.launch("copy to the card", Work(1, bytes=MEMORY_OVER_BUS * num_bytes(source)))
        if source.dtype == torch.float32 and num_bytes(source) > PIXELS:
            LEDGER.violations.append(f"{num_bytes(source) >> 20} MiB travel as float32 at {place()}")
        is_pinned = getattr(source, "is_pinned_double", False)
        if not non_blocking:
            LEDGER.wait(f"blocking copy of {list(source.shape)} to the card")
        elif not is_pinned and num_bytes(source) > STAGED:
            LEDGER.wait(f"copy of {list(source.shape)} from pageable memory")

    def _fetch(self, source: Tensor) -> None:
        LEDGER.launch("copy to the host", Work(1, bytes=MEMORY_OVER_BUS * num_bytes(source)))
        LEDGER.wait(f"read of {list(source.shape)} {str(source.dtype)[6:]}")

    def _note_host_operands(self, name: str, args: Sequence[Any]) -> None:
        """Waits inside an operation that takes a CPU tensor along."""
        on_host = lambda tensor: isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)
        if name in ("index", "_unsafe_index", "index_put_", "_index_put_impl_", "index_put"):
            if any(map(on_host, args[1])):
                LEDGER.wait("an index on the CPU is copied to the card")
            if name not in ("index", "_unsafe_index") and on_host(args[2]):
                LEDGER.wait("a value on the CPU is copied to the card")
        elif name == "where" and any(map(on_host, args)):
            LEDGER.wait("a scalar on the CPU is copied to the card")

    # What depends on values.

    def _count(self, func: Any, name: str, args: Any, kwargs: Any, flat: Sequence[Any]) -> Any:
        LEDGER.wait(f"{name}: its size depends on values")
        inputs = [each for each in flat if on_card(each)]
        LEDGER.launch(name, work_of(name, args, kwargs, inputs[:1], known))
        to_host = lambda each: values(each) if isinstance(each, FakeTensor) else each
        real = func(*tree_map(to_host, args), **{k: to_host(v) for k, v in kwargs.items() if k != "device"})
        return tree_map(lambda each: self._placed(each) if isinstance(each, Tensor) else each, real)

    def _run_index(self, func: Any, args: Any, kwargs: Any) -> Any:
        if any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1]):
            LEDGER.wait("a mask as an index: the size depends on values")
            body = torch.empty(1).expand(args[0].shape)
            index = [values(each) if isinstance(each, FakeTensor) else each for each in args[1]]
            shape = body[tuple(slice(None) if each is None else each for each in index)].shape
            out = self._made(list(shape), args[0].dtype)
            LEDGER.launch("masked index", work_of("index", args, kwargs, [out], known))
            return out
        return None

    def _run_index_put_(self, func: Any, args: Any, kwargs: Any) -> Any:
        masks = [each for each in args[1] if isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return None
        if args[2].numel() > 1 or len([each for each in args[1] if each is not None]) > 1:
            LEDGER.wait("a mask as an index: the size depends on values")
        LEDGER.launch("masked index_put_", work_of("index_put_", args, kwargs, [], known))
        return args[0]

    _run__index_put_impl_ = _run_index_put_

    # Shapes, and the values of what is small.

    def _shaped(self, func: Any, args: Any, kwargs: Any) -> Any:
        def shaped(each: Any) -> Any:
            if isinstance(each, Tensor) and not isinstance(each, FakeTensor):
                return self._fakes.from_tensor(each, static_shapes=True)
            return each

        with self._fakes:
            return func(*tree_map(shaped, args), **tree_map(shaped, kwargs))

    def _made(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._fakes:
            out = torch.empty(shape, dtype=dtype, device=DEVICE)
        LEDGER.hold(out)
        return out

    def _placed(self, real: Tensor) -> Tensor:
        out = self._made(real.shape, real.dtype)
        self._set_known(out, real)
        return out

    def _mixed_product(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """What CUDA asks of a product of bfloat16 that is wanted in float32."""
        total, (a, b, dtype) = (args[0], args[1:4]) if "add" in func._schema.name else (None, args[:3])
        if a.dtype != b.dtype or a.shape[-1] != b.shape[-2]:
            raise RuntimeError(f"{func}: {a.dtype} {list(a.shape)} @ {b.dtype} {list(b.shape)}")
        if dtype not in (a.dtype, torch.float32) or (total is not None and total.dtype != dtype):
            raise RuntimeError(f"{func}: {a.dtype} into {dtype}, onto {None if total is None else total.dtype}")
        if not all(map(on_card, (a, b))):
            raise RuntimeError(f"{func}: operands on {a.device} and {b.device}")
        shape, out = [*a.shape[:-1], b.shape[-1]], kwargs.get("out")
        if out is not None and (out.dtype != dtype or list(out.shape) != shape):
            raise RuntimeError(f"{func}: result {list(out.shape)} {out.dtype}, expected {shape} {dtype}")
        return self._made(shape, dtype) if out is None else out

    def _set_known(self, tensor: Tensor, true_values: Tensor) -> None:
        most = KNOWN_FLOATS if tensor.dtype.is_floating_point else KNOWN_INTEGERS
        if tensor.numel() <= most:
            tensor.true_values = true_values  # type: ignore[attr-defined]

    def _remember(
        self, func: Any, name: str, args: Any, kwargs: Any, flat: Sequence[Any], out: Any, made: Sequence[Tensor]
    ) -> None:
        """Compute on the CPU too what is small and known."""
        inputs = [each for each in flat if isinstance(each, FakeTensor)]
        if name in RANDOM or name.startswith(("empty", "new_empty")) or not made or "out" in kwargs:
            return
        small = all(t.numel() <= (KNOWN_FLOATS if t.dtype.is_floating_point else KNOWN_INTEGERS) for t in made)
        if not small or any(known(each) is None for each in inputs):
            return
        to_host = lambda each: known(each) if isinstance(each, FakeTensor) else each
        options = {k: torch.device("cpu") if k == "device" else to_host(v) for k, v in kwargs.items()}
        with torch.no_grad():
            real = func(*tree_map(to_host, args), **options)
        if func._schema.is_mutable:
            return
        for target, source in zip(tree_flatten(out)[0], tree_flatten(real)[0], strict=True):
            if on_card(target):
                self._set_known(target, source)


CARD = Card()

"""What `bench/gpu.py first` and `second` measure, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes.util import find_library
from functools import partial
from importlib import import_module

import torch

from bench.gpu_runs.orchestrator import Item
from bench.gpu_sections.child import Record

FIRST = (
    Item("probe", "environment", 40, is_gate=True),
    Item("micro", "micro", 20, is_gate=True),
    Item("smoke", "smoke", 30, is_gate=True),
    Item("loss 7B N=8192", "loss", 25),
    Item("update 3B", "update", 60),
    Item("rollout", "rollout", 60),
    Item("step", "step", 60),
    Item("logits", "logits", 40),
    Item("tests", "kernels", 40),
    Item("memcheck", "sanitizer", 20),
)
SECOND = (
    Item("trainer", "trainer", 80),
    Item("update C=256, 7B", "update", 50),
    Item("attention", "attention", 60),
    Item("loss, other shapes", "loss", 40),
    Item("video", "video", 50),
    Item("races", "sanitizer", 30),
    Item("kernel tests", "kernels", 60),
)
LIMIT_S = {"first": 340.0, "second": 300.0}
RUNS = {"first": FIRST, "second": SECOND}
SET_UP = {
    "first": ("import bench.bench_grpo_loss, liger_kernel.transformers", "import trl"),
    "second": ("import deepspeed",),
}
"""Python that fills caches of compiled code beside the first items, on processors that these leave idle."""


def _section(name: str, function: str = "measure", *arguments: object) -> Callable[[Record], None]:
    """A function of a module of bench/gpu_sections, imported when it runs."""
    return lambda record: getattr(import_module(f"bench.gpu_sections.{name}"), function)(record, *arguments)


def probe(record: Record) -> None:
    """The GPU's ceilings, and whether the driver brings a video decoder."""
    record.add("libnvcuvid", found=find_library("nvcuvid"))
    _section("environment")(record)


def loss(record: Record) -> None:
    """Chunks first: the largest part of what may still be chosen."""
    tuning, section = (import_module(f"bench.gpu_sections.{name}") for name in ("tuning", "loss"))
    tuning.measure(record, heads=("7B",))
    section.measure_shape(record, "7B", 8192)


def other_losses(record: Record) -> None:
    section = import_module("bench.gpu_sections.loss")
    for head, num_tokens in section.SHAPES:
        if (head, num_tokens) != ("7B", 8192):
            with record.attempt(f"{head} N={num_tokens}"):
                section.measure_shape(record, head, num_tokens)


def update(record: Record, is_long: bool) -> None:
    """Answers of 32 tokens at 3B, with what takes the time; or of 256 at 3B, and of 32 at 7B."""
    section = import_module("bench.gpu_sections.update")
    shapes = {"3B": (section.Shape(256 if is_long else 32, 8),)}
    if is_long:
        shapes["7B"] = (section.Shape(32, 8),)
    section.measure(record, shapes_of=shapes)
    if not is_long:
        with record.attempt("profile"):
            section.profile(record)


def tests(record: Record, wants_all: bool) -> None:
    """Those marked gpu; or the kernels' others, compiled."""
    section = import_module("bench.gpu_sections.kernels")
    suites = {label: chosen for label, chosen in section.all_suites().items() if ("marked gpu" in label) != wants_all}
    section.measure(record, suites)


def sanitize(record: Record, *tools: str) -> None:
    import_module("bench.gpu_sections.sanitizer").measure(record, tools)


def synchronised(function: Callable[[Record], None], record: Record) -> None:
    """Whatever of a failed item still runs or lies in memory is not the next one's."""
    function(record)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


FUNCTIONS: Mapping[str, Callable[[Record], None]] = {
    "probe": probe,
    "micro": _section("micro"),
    "smoke": _section("smoke"),
    "loss 7B N=8192": loss,
    "update 3B": partial(update, is_long=False),
    "rollout": _section("rollout"),
    "step": _section("step"),
    "logits": _section("logits"),
    "tests": partial(tests, wants_all=False),
    "memcheck": lambda record: sanitize(record, "memcheck"),
    "trainer": _section("trainer"),
    "update C=256, 7B": partial(update, is_long=True),
    "attention": _section("attention"),
    "loss, other shapes": other_losses,
    "video": _section("video"),
    "races": lambda record: sanitize(record, "racecheck", "synccheck"),
    "kernel tests": partial(tests, wants_all=True),
}
TABLE = {name: partial(synchronised, function) for name, function in FUNCTIONS.items()}

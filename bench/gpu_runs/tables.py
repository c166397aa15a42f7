"""What `bench/gpu.py first` and `second` measure, in which order, and how long each may take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from dataclasses import replace
from functools import partial
from importlib import import_module

import torch

from bench.gpu_runs.orchestrator import Item
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PUBLISHED

FIRST = (
    Item("probe", "environment", 40, is_gate=True),
    Item("micro", "micro", 30),
    Item("smoke", "smoke", 40, is_gate=True),
    Item("loss 7B N=8192", "loss", 25),
    Item("update 3B", "update", 60),
    Item("rollout", "rollout", 60),
    Item("step", "step", 60),
    Item("logits", "logits", 20),
    Item("tests", "kernels", 60),
    Item("memcheck", "sanitizer", 60),
)
SECOND = (
    Item("trainer", "trainer", 70),
    Item("update 7B", "update", 40),
    Item("update 3B C=256", "update", 30),
    Item("attention", "attention", 50),
    Item("loss, other shapes", "loss", 30),
    Item("video", "video", 30),
    Item("step, TRL", "step", 40),
    Item("loss, compiled", "loss", 60),
    Item("races", "sanitizer", 60),
    Item("kernel tests", "kernels", 60),
)
TESTS_S = 35.0
"""After which pytest begins no other test: workers start and end within the rest of the box."""
LIMIT_S = {"first": 340.0, "second": 300.0}
RUNS = {"first": FIRST, "second": SECOND}
SET_UP = {
    "first": ("import bench.bench_grpo_loss, liger_kernel.transformers", "import trl"),
    "second": ("import deepspeed",),
}
"""Python that fills caches of compiled code beside the first items, on processors that these leave idle."""


FEW_ROUNDS = replace(PUBLISHED, rounds=3)
"""Medians of three: boxes leave no time for more."""


def _section(name: str, function: str = "measure", *arguments: object) -> Callable[[Record], None]:
    """A function of a module of bench/gpu_sections, imported when it runs."""
    return lambda record: getattr(import_module(f"bench.gpu_sections.{name}"), function)(record, *arguments)


def probe(record: Record) -> None:
    """The GPU's ceilings, and whether the driver brings a video decoder."""
    record.add("libnvcuvid", found=find_library("nvcuvid") or can_load("libnvcuvid.so.1"))
    _section("environment")(record)


def can_load(library: str) -> bool:
    """The driver's folder may be one that ldconfig does not know."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def loss(record: Record) -> None:
    """The goal's shape, then its chunks: the largest part of what may still be chosen."""
    tuning, section = (import_module(f"bench.gpu_sections.{name}") for name in ("tuning", "loss"))
    section.measure_shape(record, "7B", 8192, [name for name in section.CONTENDERS if name not in section.COMPILED])
    tuning.measure(record, heads=("7B",))


def other_losses(record: Record) -> None:
    section = import_module("bench.gpu_sections.loss")
    for head, num_tokens in section.SHAPES:
        if (head, num_tokens) != ("7B", 8192):
            with record.attempt(f"{head} N={num_tokens}"):
                section.measure_shape(record, head, num_tokens, ("ours", "trl"))


def compiled_losses(record: Record) -> None:
    section = import_module("bench.gpu_sections.loss")
    for name in section.COMPILED:
        with record.attempt(name):
            section.measure_shape(record, "7B", 8192, ("ours", "trl", name), beside=f" beside {name}:")


def update(record: Record, size: str, completion_len: int, *parts: str) -> None:
    """With all activations kept, and of 7B recomputed, too, for cards that cannot."""
    section = import_module("bench.gpu_sections.update")
    shapes = [section.Shape(completion_len, 8)]
    if size == "7B":
        shapes.append(section.Shape(completion_len, 8, is_recomputed=True))
    section.measure(record, FEW_ROUNDS, {size: shapes}, parts)


def tests(record: Record, wants_all: bool) -> None:
    """Those marked gpu; or the kernels' others, compiled."""
    section = import_module("bench.gpu_sections.kernels")
    if wants_all:
        chosen = {section.COMPILED_LABEL: [*section.within(TESTS_S), *section.COMPILED]}
    else:
        chosen = {section.MARKED_LABEL: section.marked_at_once(TESTS_S)}
    section.measure(record, chosen)


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
    "update 3B": lambda record: update(record, "3B", 32, "layers", "frozen tower"),
    "rollout": _section("rollout", "measure", FEW_ROUNDS),
    "step": _section("step", "measure_video", FEW_ROUNDS),
    "logits": _section("logits"),
    "tests": partial(tests, wants_all=False),
    "memcheck": lambda record: sanitize(record, "memcheck"),
    "trainer": _section("trainer"),
    "update 7B": lambda record: update(record, "7B", 32),
    "update 3B C=256": lambda record: update(record, "3B", 256),
    "attention": _section("attention"),
    "loss, other shapes": other_losses,
    "video": _section("video"),
    "step, TRL": _section("step", "measure_text", FEW_ROUNDS),
    "loss, compiled": compiled_losses,
    "races": lambda record: sanitize(record, "racecheck", "synccheck"),
    "kernel tests": partial(tests, wants_all=True),
}
TABLE = {name: partial(synchronised, function) for name, function in FUNCTIONS.items()}

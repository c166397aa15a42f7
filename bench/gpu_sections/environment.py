"""The GPU as found, and what bounds everything else: copy bandwidth and a large bf16 GEMM on random data."""

from __future__ import annotations

import shutil

import torch

from bench.gpu_sections.child import Record
from bench.gpu_sections.timing import distance, in_turn, require

COPY_BYTES, GEMM_SIZE = 4 << 30, 8192


def measure(record: Record) -> None:
    properties = torch.cuda.get_device_properties(0)
    record.add(
        "device",
        compute_capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=properties.total_memory / 2**30,
        l2_mib=properties.L2_cache_size / 2**20,
        tools=[tool for tool in ("nvcc", "compute-sanitizer", "ncu", "ffmpeg") if shutil.which(tool)],
    )
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    target.copy_(source)
    assert torch.equal(source, target)
    times = in_turn({"copy": lambda: target.copy_(source)}, rounds=20)["copy"]
    record.add("device copy", gb_per_s=2 * COPY_BYTES / times["ms"] / 1e6, bytes=COPY_BYTES, **times)

    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device="cuda").bfloat16() for _ in range(2))
    require(distance((a @ b)[:64], a[:64].double() @ b.double()), 1e-2, "error of the GEMM")
    times = in_turn({"gemm": lambda: a @ b}, rounds=30)["gemm"]
    record.add("bf16 GEMM", tflops_per_s=2 * GEMM_SIZE**3 / times["ms"] / 1e9, size=GEMM_SIZE, **times)

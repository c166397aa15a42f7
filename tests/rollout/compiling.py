"""Ahead-of-time compilation of a Triton kernel for GPUs that are not here, in a process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

PROGRAM = """
import inspect, json, subprocess, sys, tempfile
from importlib import import_module
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

where, types, sizes, options, archs = json.loads(sys.argv[1])
module, _, name = where.partition(":")
kernel = getattr(import_module(module), name)
order = [parameter.name for parameter in kernel.params]
signature = {name: types.get(name, "constexpr") for name in order}
aligned = {(order.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for arch in archs:
    made = triton.compile(
        ASTSource(kernel, signature, sizes, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )
    assert "ld.global.v4" in made.asm["ptx"] or "cp.async.cg" in made.asm["ptx"], "loads are narrow"
    assert made.metadata.shared <= 160 << 10, made.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    assert "STACK:0 " in usage and "LOCAL:0 " in usage, usage
print("compiled")
"""


def compiles(
    where: str,
    types: Mapping[str, str],
    sizes: Mapping[str, object],
    archs: Sequence[int] = (80, 90, 100),
    **options: int,
) -> None:
    """Assert that the kernel `module:name` compiles for the chips `archs` with wide loads and without spills.

    types: of its arguments as Triton writes them. sizes: its constants. options: num_warps and the like.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = json.dumps([where, types, sizes, options, archs])
    command = [sys.executable, "-c", PROGRAM, given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]

"""What the compiler makes of the kernels on chips that are not here: bench/aot.py, without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
READ_LOGITS = ("row_statistics_kernel",)
WRITE_GRADIENTS = ("row_loss_kernel", "row_gradient_kernel")
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(
    scope="module", params=[90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))], ids="sm_{}".format
)
def arch(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def measurements(arch, tmp_path_factory) -> dict[str, dict]:
    """What bench/aot.py found for one chip, by kernel and constants; it fails if a kernel is not covered."""
    output = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "aot.py", "--arch", str(arch), "--output", output]
    subprocess.run(command, env=environment, check=True)
    kernels = json.loads(output.read_text())["kernels"]
    assert kernels
    return {label: rows[f"sm_{arch}"] for label, rows in kernels.items()}


def test_no_kernel_spills_registers(measurements):
    assert not {label: row["spilled_bytes"] for label, row in measurements.items() if row["spilled_bytes"]}


def test_shared_memory_fits_the_chip(measurements, arch):
    assert max(row["shared_bytes"] for row in measurements.values()) <= SHARED_MEMORY_LIMIT[arch]


def test_batch_length_temperature_and_clip_values_compile_nothing_anew(measurements):
    assert not {label: row["compilations"] for label, row in measurements.items() if row["compilations"] > 1}


def test_python_floats_of_torch_compile_cause_no_fp64_arithmetic(measurements):
    """Inductor passes them as fp64; a scalar may be converted, no element may be computed so."""
    wide = {label: row["instructions"].get("fp64", 0) for label, row in measurements.items() if "fp64" in label}
    kernels = {label.split(": ")[1].split("(")[0] for label in wide}
    assert kernels == {"row_statistics_kernel", "row_gradient_kernel", "row_loss_kernel", "group_advantage_kernel"}
    assert not any(wide.values()), wide


def test_logits_move_in_16_byte_accesses(measurements):
    """For vocabularies that are no multiple of 16 too."""
    for label, row in measurements.items():
        kernel = label.split(": ")[1].split("(")[0]
        if kernel in READ_LOGITS + WRITE_GRADIENTS:
            assert row["instructions"]["global_load_16_byte"] >= 2, label
        if kernel in WRITE_GRADIENTS:
            assert row["instructions"]["global_store_16_byte"] >= 2, label


def test_committed_table_lists_the_same_kernels(measurements, arch):
    committed = json.loads((BENCH / "results/aot.json").read_text())["kernels"]
    stale = measurements.keys() ^ {label for label, rows in committed.items() if f"sm_{arch}" in rows}
    assert not stale, "regenerate it: python bench/aot.py"


def test_committed_table_covers_every_chip_without_spills():
    for label, rows in json.loads((BENCH / "results/aot.json").read_text())["kernels"].items():
        assert rows.keys() == {f"sm_{arch}" for arch in SHARED_MEMORY_LIMIT}, label
        for arch, limit in SHARED_MEMORY_LIMIT.items():
            row = rows[f"sm_{arch}"]
            assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= limit, label

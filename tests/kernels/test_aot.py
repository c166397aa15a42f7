"""What the compiler makes of the kernels on chips that are not here: bench/aot.py, without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot

BENCH = Path(__file__).parents[2] / "bench"
READ_LOGITS = ("row_statistics_kernel",)
WRITE_GRADIENTS = ("row_loss_kernel", "row_gradient_kernel")
CHANGE_STATES = ("delta_step_kernel",)
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


EVERY_KERNEL_ONCE = (
    "row_loss/k3_corrected, softcap",
    "row_loss/V 50257, bias",
    "row_gradient/entropy, softcap",
    "advantages/orarl",
    "logits",
    "linear_step",
    "tower_rotation",
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90, EVERY_KERNEL_ONCE), id="sm_90-few"),
        *(pytest.param((arch, ()), id=f"sm_{arch}", marks=pytest.mark.slow) for arch in SHARED_MEMORY_LIMIT),
    ],
)
def arch_and_cases(request) -> tuple[int, tuple[str, ...]]:
    """A chip and names of cases of bench/aot.py; none for all of them."""
    return request.param


@pytest.fixture(scope="module")
def arch(arch_and_cases) -> int:
    return arch_and_cases[0]


@pytest.fixture(scope="module")
def cases(arch_and_cases) -> tuple[str, ...]:
    return arch_and_cases[1]


@pytest.fixture(scope="module")
def measurements(arch, cases, tmp_path_factory) -> dict[str, dict]:
    """What bench/aot.py found for one chip, by kernel and constants; it fails if a kernel is not covered."""
    output = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCH / "aot.py", "--arch", str(arch), "--output", output]
    subprocess.run([*command, *(["--cases", *cases] if cases else [])], env=environment, check=True)
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


def test_logits_and_states_move_in_16_byte_accesses(measurements):
    """For vocabularies that are no multiple of 16 too."""
    for label, row in measurements.items():
        kernel = label.split(": ")[1].split("(")[0]
        if kernel in READ_LOGITS + WRITE_GRADIENTS + CHANGE_STATES:
            assert row["instructions"]["global_load_16_byte"] >= 2, label
        if kernel in WRITE_GRADIENTS + CHANGE_STATES:
            assert row["instructions"]["global_store_16_byte"] >= 2, label


def test_rows_of_logits_and_states_are_counted_in_64_bits(measurements):
    """Offsets of int32 would go wrong beyond 2**31 elements, which test_offsets.py meets on a GPU."""
    for label, row in measurements.items():
        if label.split(": ")[1].split("(")[0] in READ_LOGITS + WRITE_GRADIENTS + CHANGE_STATES:
            assert row["row_bits"] == 64, label


def test_committed_table_lists_the_same_kernels(measurements, arch, cases):
    committed = json.loads((BENCH / "results/aot.json").read_text())["kernels"]
    of_cases = {label for label in committed if not cases or label.split(": ")[0] in cases}
    stale = measurements.keys() ^ {label for label in of_cases if f"sm_{arch}" in committed[label]}
    assert not stale, "regenerate it: python bench/aot.py"


def test_committed_table_covers_every_case_and_chip_without_spills():
    committed = json.loads((BENCH / "results/aot.json").read_text())["kernels"]
    assert {label.split(": ")[0] for label in committed} == set(aot.CASES), "regenerate it: python bench/aot.py"
    for label, rows in committed.items():
        assert rows.keys() == {f"sm_{arch}" for arch in SHARED_MEMORY_LIMIT}, label
        for arch, limit in SHARED_MEMORY_LIMIT.items():
            row = rows[f"sm_{arch}"]
            assert row["spilled_bytes"] == 0 and row["shared_bytes"] <= limit, label

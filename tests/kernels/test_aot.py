"""What the compiler makes of the kernels on chips that are not here: bench/aot.py, without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("aot") / "aot.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, BENCH / "aot.py", "--output", output], env=environment, check=True)
    return json.loads(output.read_text())["kernels"]


@pytest.fixture
def measurements(table) -> list[tuple[str, str, dict]]:
    return [(label, arch, row) for label, rows in table.items() for arch, row in rows.items()]


def test_every_kernel_compiles_for_every_chip(table):
    assert table
    assert all(rows.keys() == SHARED_MEMORY_LIMIT.keys() for rows in table.values())


def test_no_kernel_spills_registers(measurements):
    spilling = {(label, arch): row["spilled_bytes"] for label, arch, row in measurements if row["spilled_bytes"]}
    assert not spilling


def test_shared_memory_fits_the_chip(measurements):
    assert all(row["shared_bytes"] <= SHARED_MEMORY_LIMIT[arch] for _, arch, row in measurements)


def test_batch_length_temperature_and_clip_values_compile_nothing_anew(measurements):
    recompiled = {(label, arch): row["compilations"] for label, arch, row in measurements if row["compilations"] > 1}
    assert not recompiled


def test_logits_move_in_16_byte_accesses(measurements):
    rows = [row["instructions"] for label, _, row in measurements if "logits_" in label]
    assert rows
    assert all(row["global_load_16_byte"] >= 2 for row in rows)


def test_committed_table_lists_the_same_kernels(table):
    committed = json.loads((BENCH / "results/aot.json").read_text())["kernels"]
    assert committed.keys() == table.keys(), "regenerate it: python bench/aot.py"

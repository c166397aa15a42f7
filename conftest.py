"""What must hold before any test or benchmark module is imported, and the meaning of the `gpu` and `vllm` markers."""

import os
from importlib.util import find_spec

import pytest
import torch

pytest_plugins = ["tests.trainer_fixtures"]

if not torch.cuda.is_available():
    # Triton decides at decoration time whether a kernel is compiled or interpreted, so this cannot wait for a fixture.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # As `prepare_environment` does for runs: bf16 within what virtual machines really have.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`gpu` tests skip without a CUDA device, `vllm` tests without vLLM, and fail there when they are required."""
    if item.get_closest_marker("vllm") is not None and find_spec("vllm") is None:
        if os.environ.get("TEMPSAMP_REQUIRE_VLLM") == "1":
            pytest.fail("TEMPSAMP_REQUIRE_VLLM=1, but vLLM is not installed")
        pytest.skip("needs vLLM: make test-vllm")
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("TEMPSAMP_REQUIRE_GPU") == "1":
        pytest.fail("TEMPSAMP_REQUIRE_GPU=1, but torch finds no CUDA device")
    pytest.skip("needs a CUDA device")

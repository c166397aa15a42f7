"""What this process runs on; imported before torch does any work and before DeepSpeed is imported."""

from __future__ import annotations

import os

import torch


def prepare_environment() -> None:
    """Make one process without a launcher, and a machine without a GPU, work like any other.

    oneDNN's AMX kernels die with SIGILL on virtual machines that advertise AMX without having it, so CPU runs cap the
    instruction set. DeepSpeed's own shared-memory collective is compiled at start-up; gloo serves as well.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def free_port() -> int:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def training_device() -> torch.device:
    """This rank's GPU, made the current one for collectives and kernels, or the CPU where there is none."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")

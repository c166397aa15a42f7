"""What this process runs on; imported before torch does any work and before DeepSpeed is imported."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.system.ranks import of_all_ranks

SLURM_PORTS = range(20_000, 30_000)
"""Where ranks that srun starts meet."""
STAGED_BYTES = 64 << 10
"""The driver sets as much of a copy from pageable memory aside; of more it waits until the device has it."""


def prepare_environment() -> None:
    """Make one process without a launcher, and a machine without a GPU, work like any other.

    oneDNN's AMX kernels die with SIGILL on virtual machines that advertise AMX without having it, so CPU runs cap the
    instruction set. DeepSpeed's own shared-memory collective is compiled at start-up; gloo serves as well.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (alone | _started_by_srun()).items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if not torch.cuda.is_available():
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _started_by_srun() -> dict[str, str]:
    """What launchers tell ranks, from what srun tells its tasks; nothing where there are none or a launcher spoke.

    They meet at the first node of the step, on a port that only the job's number decides.
    """
    given = os.environ
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    first = re.match(r"(?P<name>[^\[,]+)(\[(?P<number>\d+))?", given["SLURM_STEP_NODELIST"])
    assert first is not None
    return {
        "RANK": given["SLURM_PROCID"],
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "MASTER_ADDR": first["name"] + (first["number"] or ""),
        "MASTER_PORT": str(SLURM_PORTS.start + int(given["SLURM_JOB_ID"]) % len(SLURM_PORTS)),
    }


def decoding_threads() -> int:
    """This rank's share of the processors that it may run on, of those that ranks of its host have in common.

    Called by every rank.
    """
    host, own = socket.gethostname(), os.sched_getaffinity(0)
    others = of_all_ranks((host, own))
    return max(1, len(own) // sum(at == host and bool(cores & own) for at, cores in others))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_ranks(backend: str, timeout: timedelta | None = None) -> None:
    """Initialise torch.distributed, once, so that no other host reaches a port of a run on this one.

    One process meets nobody, yet gloo listens for it, on loopback. Several whose MASTER_ADDR is this host's loopback
    meet there; a launcher that gives another address (several nodes) has torch listen on all interfaces. torchrun's
    own agent does so in any case.
    """
    if dist.is_initialized():
        return
    rank, num_ranks, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["MASTER_ADDR"]
    store: dist.Store | None = None
    if num_ranks == 1 or ipaddress.ip_address(socket.gethostbyname(address)).is_loopback:
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
        if num_ranks == 1:
            store = dist.HashStore()
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            port = int(os.environ["MASTER_PORT"])
            door = socket.create_server(("127.0.0.1", port)).detach() if rank == 0 else None
            store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0, master_listen_fd=door)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=num_ranks)


def training_device() -> torch.device:
    """This rank's GPU, made the current one for collectives and kernels, or the CPU where there is none."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, by a copy that waits for nothing: from pinned memory, or small enough to set aside."""
    if device.type == "cuda" and not tensor.is_cuda and tensor.nbytes > STAGED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

"""What a run listens on: nothing where it is one process, and loopback alone where all are on one host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tempsamp_fast.system.device import free_port, join_ranks, prepare_environment


def listening() -> list[str]:
    """Addresses, in /proc's hexadecimal, that this process listens on."""
    own = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue  # the folder itself
    tables = [Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def in_fork(work: Callable[[], None]) -> int:
    """The process id of a copy of this one that does `work` and exits with 0 when it succeeds."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.__stderr__, flush=True)
        os._exit(1)


def rank(number: int, num_ranks: int, port: int, address: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    if num_ranks > 1:
        os.environ |= {"RANK": str(number), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(number)}
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    prepare_environment()
    join_ranks("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert float(total) == num_ranks
    found = listening()
    assert set(found) <= LOOPBACK, found
    assert number or num_ranks == 1 or found, "the first of several ranks has to listen"
    dist.barrier()


@pytest.mark.skipif(dist.is_initialized(), reason="a group of this process would be inherited")
@pytest.mark.parametrize(("num_ranks", "address"), [(1, ""), (2, "127.0.0.1"), (2, "localhost")])
def test_a_run_on_one_host_opens_no_port_to_others(num_ranks: int, address: str) -> None:
    port = free_port()
    children = [in_fork(lambda number=number: rank(number, num_ranks, port, address)) for number in range(num_ranks)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * num_ranks

"""What a run listens on: loopback alone where all of its processes are on one host, one of them or several."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tempsamp_fast.system.device import join_ranks, prepare_environment


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


def check(words: list[str]) -> None:
    """What a rank does, with `address` for the first one's where there are several."""
    number, num_ranks, address = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), words[0]
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if num_ranks > 1:
        os.environ["MASTER_ADDR"] = address
    else:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
    prepare_environment()
    join_ranks("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert float(total) == num_ranks
    found = listening()
    assert set(found) <= LOOPBACK, found
    assert number or num_ranks == 1 or found, "the first of several ranks has to listen"
    dist.barrier()


@pytest.mark.parametrize(("num_ranks", "address"), [(1, ""), (2, "127.0.0.1"), (2, "localhost")])
def test_a_run_on_one_host_opens_no_port_to_others(rank_server, tmp_path: Path, num_ranks: int, address: str) -> None:
    """In processes of their own: one that has a group already would hand it down."""
    rank_server.run(tmp_path / "logs", num_ranks, [address], "tests.security.test_ports:check")

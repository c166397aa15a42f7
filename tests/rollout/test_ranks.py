"""Two ranks with uneven work finish together, also when every parameter is partitioned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempsamp_fast.system.device import free_port

WORKER = Path(__file__).with_name("rank_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_uneven_ranks_sample_the_same_and_update_without_a_hang(zero_stage: int) -> None:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(zero_stage)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output[-3000:] for output in outputs)

"""Two launchers that know each other by address only, as on two machines: one run, as that of a single process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tempsamp_fast.run.log import read_metrics
from tempsamp_fast.system.device import free_port

REPOSITORY = Path(__file__).parents[2]
STEPS = ("--phases", "sft:3,grpo:1", "--zero_stage", "2")


@pytest.mark.slow
def test_two_nodes_train_as_one_process(trainer, tmp_path: Path) -> None:
    """The commands of docs/multi_node.md without ssh, two addresses on one machine standing for two nodes."""
    recorded = tmp_path / "rollouts.jsonl"
    expected = trainer.main(tmp_path / "one", *STEPS, "--record_rollouts", str(recorded))
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    shared = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    words = ("--gradient_accumulation_steps", "1", "--replay_rollouts", str(recorded))
    set_by_launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    environment = {name: value for name, value in os.environ.items() if name not in set_by_launcher}
    nodes = [
        subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("deepspeed")), *shared, "--node_rank", str(node)),
                *(str(REPOSITORY / "tempsamp_fast/train.py"), *trainer.flags(tmp_path / "run", *STEPS, *words)),
            ],
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    outputs = [node.communicate(timeout=500)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "nnodes=2, num_local_procs=1, node_rank=1" in outputs[1]
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-7)
        assert ours["optim/grad_norm"] == pytest.approx(theirs["optim/grad_norm"], rel=1e-4)

"""How a process learns which rank it is, and what of its host is its own."""

from __future__ import annotations

import os

import pytest
import torch

from tempsamp_fast.system import device
from tempsamp_fast.system.device import decoding_threads, prepare_environment, training_device

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    """`told(environment)`: what `prepare_environment` makes of it."""

    def of(environment: dict[str, str]) -> list[str]:
        with monkeypatch.context() as patch:
            for name in (*OURS, *SRUN):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            prepare_environment()
            found = [os.environ[name] for name in OURS]
            for name in OURS:  # what was set beside the patch goes with it
                patch.setenv(name, "")
        return found

    return of


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[07-08]", "node07"), ("node-a", "node-a"), ("gpu[3,9-11],old[1-2]", "gpu3"), ("a-1,b-2", "a-1")],
)
def test_a_task_of_srun_is_a_rank(told, nodes: str, first: str) -> None:
    assert told(SRUN | {"SLURM_STEP_NODELIST": nodes}) == ["11", "16", "3", first, "23456"]


def test_a_launcher_inside_a_job_has_the_last_word_and_a_single_task_is_alone(told) -> None:
    launched = dict(zip(OURS, ("1", "4", "1", "elsewhere", "7"), strict=True))
    assert told(SRUN | launched) == list(launched.values())
    assert told(SRUN | {"SLURM_STEP_NUM_TASKS": "1"})[:4] == ["0", "1", "0", "127.0.0.1"]


@pytest.mark.parametrize(
    ("of_ranks", "threads"),
    [
        ([("a", {0, 1, 2, 3, 4, 5, 6, 7})] * 4 + [("b", {0, 1, 2, 3, 4, 5, 6, 7})] * 4, 2),
        ([("a", {0, 1, 2}), ("a", {3, 4, 5})], 3),  # bound by srun: each has its own
        ([("a", {0})] * 3, 1),
    ],
)
def test_ranks_of_a_host_share_the_cores_that_they_have_in_common(
    monkeypatch: pytest.MonkeyPatch, of_ranks: list, threads: int
) -> None:
    monkeypatch.setattr(device, "of_all_ranks", lambda own: of_ranks)
    monkeypatch.setattr("socket.gethostname", lambda: of_ranks[0][0])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: of_ranks[0][1])
    assert decoding_threads() == threads


def test_a_rank_has_the_gpu_of_its_place_on_its_host_and_makes_it_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third rank of a second host of four."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert training_device() == torch.device("cuda", 2) and made_current == [torch.device("cuda", 2)]

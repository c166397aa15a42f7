"""Two ranks with uneven work finish together, also when every parameter is partitioned."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [3, 2])
def test_uneven_ranks_sample_the_same_and_update_without_a_hang(rank_server, tmp_path: Path, zero_stage: int) -> None:
    """ZeRO-3 gathers the weights once for a rollout, or layer by layer in every pass of it."""
    rank_server.run(tmp_path / "logs", 2, [str(zero_stage)], "tests.rollout.rank_worker:main")

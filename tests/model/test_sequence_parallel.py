"""Rows on several ranks: the same loss and gradients as on one, and what cannot be shared out is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tempsamp_fast.model.sequence_parallel import check_sequence_parallel, sequence_group
from tests.conftest import Tiny


@pytest.mark.parametrize(
    ("num_ranks", "families"),
    [
        (2, ("qwen2_5_vl", "qwen3_vl")),
        pytest.param(4, ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_a_row_make_its_loss_and_gradients(
    rank_server, tmp_path: Path, num_ranks: int, families: tuple[str, ...]
) -> None:
    """Trees, groups, rows of one video with fewer frames than ranks, answers on one rank of several; float64.

    Four ranks outnumber the two key-value heads.
    """
    errors = tmp_path / "errors.json"
    rank_server.run(tmp_path / "logs", num_ranks, [str(errors), *families], "tests.model.sequence_worker:main")
    found = json.loads(errors.read_text())
    assert len(found) == 7 * len(families)
    assert {name: pair for name, pair in found.items() if max(pair) > 1e-10} == {}


@pytest.mark.parametrize(
    ("family", "size", "complaint"),
    [
        ("qwen3_5", 2, "qwen3_5 has layers of linear_attention"),
        ("qwen2_5_vl", 3, "must divide the model's 4 heads.*choose one of 1, 2, 4$"),
        ("qwen2_5_vl", 8, "must divide the model's 4 heads"),
        ("qwen2_5_vl", 4, None),
        ("qwen3_5", 1, None),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(family: str, size: int, complaint: str | None) -> None:
    config = Tiny(family).model().config
    if complaint is None:
        return check_sequence_parallel(size, config)
    with pytest.raises(ValueError, match=f"sequence_parallel_size={size}.*{complaint}"):
        check_sequence_parallel(size, config)


def test_ranks_must_divide_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    assert sequence_group(1) is None
    with pytest.raises(ValueError, match="sequence_parallel_size=2: must be a divisor of the number of ranks, 1"):
        sequence_group(2)

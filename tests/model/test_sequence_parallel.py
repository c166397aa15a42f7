"""Rows on several ranks: the same loss and gradients as on one, and what cannot be shared out is refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tempsamp_fast.model.sequence_parallel import UlyssesAttention, check_sequence_parallel, sequence_group
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


@pytest.mark.parametrize(("num_ranks", "heads"), [(2, [0, 1]), (4, [0, 0, 1, 1])])
def test_every_rank_has_a_key_value_head(monkeypatch: pytest.MonkeyPatch, num_ranks: int, heads: list[int]) -> None:
    """Four ranks get each of two heads twice, side by side as the query heads that read it; a double of DeepSpeed's."""
    exchanged: list[torch.Tensor] = []

    def exchange(query: torch.Tensor, *keys_and_values: Any) -> torch.Tensor:
        exchanged.extend(keys_and_values[:2])
        return query

    layer = SimpleNamespace(DistributedAttention=lambda *_, **__: exchange)
    monkeypatch.setitem(sys.modules, "deepspeed.sequence.layer", layer)
    inner: Any = SimpleNamespace(recurrence=None)
    shares: Any = SimpleNamespace(num_ranks=num_ranks, group=None)
    key = torch.arange(2.0)[None, :, None, None].expand(1, 2, 3, 8)
    UlyssesAttention(inner, shares)(0, torch.zeros(1, 4, 3, 8), key, key, 1.0)
    assert [tensor[0, 0, :, 0].tolist() for tensor in exchanged] == [heads, heads]


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


@pytest.mark.parametrize(("rank", "group"), [(0, [0, 1]), (1, [0, 1]), (4, [4, 5]), (5, [4, 5])])
def test_neighbours_share_rows(monkeypatch: pytest.MonkeyPatch, rank: int, group: list[int]) -> None:
    """Six ranks in three groups of two; every rank makes all groups, in the same order."""
    made: list[list[int]] = []
    found = {"is_initialized": True, "get_world_size": 6, "get_rank": rank}
    for name, value in found.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "new_group", lambda ranks: made.append(list(ranks)) or made[-1])
    assert sequence_group(2) == group and made == [[0, 1], [2, 3], [4, 5]]

"""The GPU sections that run whole models, on a CPU and in miniature: all but what only a GPU has comes to its end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_runs.worker import is_spent
from bench.gpu_sections import attention, rollout, smoke, step, trainer, update
from bench.gpu_sections.child import Record
from bench.gpu_sections.models import PLAIN_LAYERS, PUBLISHED, RECOMPUTED, Scale
from bench.gpu_sections.update import Shape

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the sections themselves can run"),
]
MINIATURE = Scale(
    device="cpu",
    prompt_len=150,
    grid=(4, 8, 16),
    wide_grid=(2, 8, 32),
    rounds=1,
    cache_share=0.01,
    text_values={
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    },
    vision_values={
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_heads": 2,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
)


def kept(record: Record) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Rows by label, and errors; each row is ready for JSON and has no figure that is not a number."""
    rows = json.loads(record.file.read_text())["rows"]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
    return {row["label"]: row for row in rows}, record.errors


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "rows.json")


def test_update(record: Record) -> None:
    """Liger's layers are Triton kernels: without a GPU they are refused, and the rest goes on."""
    shapes = (Shape(8, 4), Shape(8, 2, num_groups=2, is_recomputed=True))
    update.measure(record, MINIATURE, {"3B": shapes, "7B": shapes[:1]})
    rows, errors = kept(record)
    assert all("Liger layers" in error for error in errors), errors
    for size in ("3B", "7B"):
        assert rows[f"{size} C=8 G=4 packed"]["over_unpacked"] > 1
        assert f"{size} C=8 G=4 frozen tower, features kept" in rows
    assert "goals" in rows["3B C=8 G=4 packed"] and "goals" not in rows["7B C=8 G=4 packed"]
    assert rows["3B C=8 G=2 x2 recomputed row per group"]["over_row_per_group"] == 1


def test_step(record: Record) -> None:
    step.measure(record, MINIATURE, length=6)
    rows, errors = kept(record)
    assert not errors
    assert rows["video, G=8, ours"]["over_plain_step"] > 1
    assert rows["text, ours"]["over_trl"] > 1


def test_trainer(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves an open process group, so that no other item shares its process."""
    for name, value in trainer.ONE_RANK.items():
        monkeypatch.setenv(name, value)
    small = ["--prompts_per_device=2", "--num_generations=3", "--max_completion_length=5"]
    trainer.measure(record, MINIATURE, more=small)
    assert is_spent()
    rows, errors = kept(record)
    assert not errors
    (row,) = rows.values()
    assert row["rollouts_per_s"] > 0 and row["sampling_s"] > 0


def test_smoke(record: Record) -> None:
    smoke.measure(record, MINIATURE)
    rows, errors = kept(record)
    assert not errors and set(rows) == {"packed rows", "rollout", "loss"}


def test_rollout_keeps_its_rows_where_cuda_graphs_fail(record: Record) -> None:
    rollout.measure(record, MINIATURE, length=6, num_prompts=(2, 1))
    rows, errors = kept(record)
    assert [error.split(":")[0] for error in errors] == ["2 prompts ours, graphs", "1 prompts ours, graphs"]
    assert rows["1 prompts ours"]["logp_error"] < 0.02
    assert {"decode_ms_per_token", "decode_over_weights"} <= rows["1 prompts ours"].keys()
    assert {"1 prompts generate", "2 prompts ours", "text, 2 prompts continuous batching"} <= rows.keys()


def test_packed_model_against_separate_rows(record: Record) -> None:
    attention.measure_model(record, MINIATURE)
    rows, errors = kept(record)
    assert not errors and len(rows) == 2


def test_memory_by_arithmetic_says_which_shapes_want_a_larger_card() -> None:
    """GiB of the 7B shape: over 80 with all activations of plain layers, less with Liger's, well below recomputed."""
    config = PUBLISHED.config("7B")
    assert 80 < PUBLISHED.update_gib(config, 32, 8, settings=PLAIN_LAYERS) < 90
    assert 65 < PUBLISHED.update_gib(config, 32, 8) < 78
    assert PUBLISHED.update_gib(config, 32, 8, settings=RECOMPUTED) < 45

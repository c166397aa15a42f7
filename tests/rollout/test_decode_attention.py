"""Attention of new tokens to shared and own keys: the kernels, their twin, and plain attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tempsamp_fast.rollout import spans as module
from tempsamp_fast.rollout.decode_attention import BLOCK_KEYS, DecodedRows, LayerKeys, decode_attention
from tempsamp_fast.rollout.spans import cut
from tests.rollout.compiling import compiles

NUM_KEYS, ROOM, SLOTS = 90, 24, (0, 1, 2, 4, 5, 6)
VIDEO, ALONE, QUESTIONS = (3, 40), ((60, 17), (79, 9)), ((43, 5), (48, 1))
PATHS = ((VIDEO, QUESTIONS[0]),) * 3 + ((VIDEO, QUESTIONS[1]), (ALONE[0],), (ALONE[1],))
"""Of six rows: three answers to a question, one to another about the same video, two of prompts of their own."""


def inputs(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, step: int
) -> tuple[list[Tensor], LayerKeys, DecodedRows]:
    """Everything that must not be read is NaN."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    (num_heads, num_kv), num_rows = heads, len(PATHS)
    layer = LayerKeys(
        *(draw(NUM_KEYS, num_kv, head_dim) for _ in range(2)), *(draw(7, ROOM, num_kv, head_dim) for _ in range(2))
    )
    is_read = torch.zeros(NUM_KEYS, dtype=torch.bool)
    for first, length in (VIDEO, *ALONE, *QUESTIONS):
        is_read[first : first + length] = True
    for shared in (layer.keys, layer.values):
        shared[~is_read] = float("nan")
    spans, num_parts = cut(PATHS, num_kv)
    items = [item for span in spans for item in span.items(module.rows_per_item(*heads))]
    most = max(num_parts) + 1
    rows = DecodedRows(
        slots=torch.tensor(SLOTS),
        step=torch.tensor([step]),
        spans=spans,
        items=torch.tensor([*items, [0] * 5], dtype=torch.int32),
        num_parts=torch.tensor(num_parts, dtype=torch.int32),
        parts=torch.full((num_rows, most, num_heads, head_dim), float("nan")),
        lses=torch.full((num_rows, most, num_heads), float("nan")),
    )
    return [draw(num_rows, num_heads, head_dim), *(draw(num_rows, num_kv, head_dim) for _ in range(2))], layer, rows


def expected(newest: Sequence[Tensor], layer: LayerKeys, step: int) -> Tensor:
    """Row by row, in float64."""
    query, key, value = (each.double() for each in newest)
    outputs = []
    for row, (slot, path) in enumerate(zip(SLOTS, PATHS, strict=True)):
        spans = [slice(first, first + length) for first, length in path]
        keys, values = (
            torch.cat([*(shared[span] for span in spans), own[slot, :step]]).double()
            for shared, own in ((layer.keys, layer.own_keys), (layer.values, layer.own_values))
        )
        keys, values = torch.cat([keys, key[row : row + 1]]), torch.cat([values, value[row : row + 1]])
        repeats = query.shape[1] // key.shape[1]
        keys, values = (each.repeat_interleave(repeats, dim=1) for each in (keys, values))
        weights = (torch.einsum("hd,nhd->hn", query[row], keys) * 0.2).softmax(-1)
        outputs.append(torch.einsum("hn,nhd->hd", weights, values))
    return torch.stack(outputs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "step", "piece", "most"),
    [((4, 2), 16, 0, 256, 64), ((6, 2), 20, 5, 7, 64), ((8, 1), 32, ROOM - 1, 16, 16)],
    ids=["no_own_keys", "many_pieces", "few_rows_a_program"],
)
def test_rows_attend_to_their_path_and_their_own_tokens(
    heads, head_dim: int, step: int, piece: int, most: int, dtype: torch.dtype, impl: str, monkeypatch
) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", piece)
    monkeypatch.setattr(module, "MAX_QUERIES", most)
    newest, layer, rows = inputs(heads, head_dim, dtype, step)
    wanted = expected(newest, layer, step)
    output = decode_attention(*newest, layer, rows, 0.2, impl)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert output.dtype == dtype
    assert (output.double() - wanted).abs().max() < bound * wanted.abs().max()
    slots = torch.tensor(SLOTS)
    assert torch.equal(layer.own_keys[slots, step], newest[1]) and torch.equal(layer.own_values[slots, step], newest[2])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_common_offset_of_the_scores_does_not_cost_precision(impl: str) -> None:
    """Scores rounded to half precision would. (The interpreter multiplies no bfloat16.)"""
    newest, layer, rows = inputs((4, 2), 16, torch.float16, 3)
    for keys in (layer.keys, layer.own_keys, newest[1]):
        keys += 40.0
    output = decode_attention(*newest, layer, rows, 0.2, impl)
    wanted = expected(newest, layer, 3)
    assert (output.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_spans_are_cut_into_pieces_that_cover_each_key_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", 7)
    spans, num_parts = cut(PATHS, 1)
    seen: dict[tuple[int, int], list[int]] = {}
    for span in spans:
        for first_row, num_rows, first_key, num_keys, part in span.items(2):
            assert 0 < num_rows <= 2 and num_keys > 0
            for row in range(first_row, first_row + num_rows):
                seen.setdefault((row, part), []).extend(range(first_key, first_key + num_keys))
    for row, path in enumerate(PATHS):
        parts = [seen.pop((row, part)) for part in range(num_parts[row])]
        assert sorted(key for part in parts for key in part) == [
            key for first, length in path for key in range(first, first + length)
        ]
    assert not seen and max(num_parts) > 6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_the_kernels_are_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_PIECE", 16)
    newest, layer, rows = inputs((16, 2), 128, dtype, 7)
    wanted = expected(newest, layer, 7)
    there = lambda record: replace(
        record, **{name: value.cuda() for name, value in vars(record).items() if isinstance(value, Tensor)}
    )
    output = decode_attention(*(each.cuda() for each in newest), there(layer), there(rows), 0.2, "triton").cpu()
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert (output.double() - wanted).abs().max() < bound * wanted.abs().max()


POINTERS = {"query": "*bf16", "keys": "*bf16", "values": "*bf16", "items": "*i32", "parts": "*fp32", "lses": "*fp32"}
OWN = {"key": "*bf16", "value": "*bf16", "own_keys": "*bf16", "own_values": "*bf16", "slots": "*i64", "step": "*i64",
       "num_parts": "*i32", "output": "*bf16"}  # fmt: skip


@pytest.mark.parametrize(
    ("heads_per_kv", "head_dim", "archs"),
    [
        pytest.param(8, 128, [90], marks=pytest.mark.slow, id="3B"),
        pytest.param(8, 128, [80, 100], marks=pytest.mark.slow, id="3B, other chips"),
        pytest.param(7, 128, [80, 90, 100], marks=pytest.mark.slow, id="7B"),
        pytest.param(4, 256, [80, 90, 100], marks=pytest.mark.slow, id="Qwen3.5-4B"),
    ],
)
def test_the_kernels_compile_for_gpus_with_wide_loads_and_without_spills(
    heads_per_kv: int, head_dim: int, archs: list[int]
) -> None:
    """For chips that are not here, eight answers a prompt."""
    numbers = {"num_kv_heads": "i32", "part_room": "i32", "scaling": "fp32"}
    sizes = {"heads_per_kv": heads_per_kv, "head_dim": head_dim, "BLOCK_D": head_dim}
    sizes["BLOCK_N"] = BLOCK_KEYS * 128 // head_dim
    name, num_warps = "tempsamp_fast.rollout.decode_attention", 4 if head_dim == 128 else 8
    compiles(f"{name}:shared_keys_kernel", POINTERS | numbers, sizes | {"BLOCK_M": 64}, archs, num_warps=num_warps)
    own = {key: kind for key, kind in (POINTERS | OWN).items() if key not in ("keys", "values", "items")}
    compiles(
        f"{name}:own_keys_kernel", own | numbers | {"room": "i32"}, sizes | {"BLOCK_H": 16}, archs, num_warps=num_warps
    )


def test_spans_that_are_read_at_once_are_of_like_size_and_share_no_row() -> None:
    paths = [((0, 50), (50, 3)), ((0, 50), (53, 2)), ((60, 7),), ((70, 3),), ((80, 1),)]
    spans, _ = cut(paths, 1)
    batches = module.alike(spans)
    assert sorted(span.first_key for batch in batches for span in batch) == [0, 50, 53, 60, 70, 80]
    assert [sorted(span.num_keys for span in batch) for batch in batches] == [[1, 2], [3, 3], [7], [50]]
    level = module.alike(cut([((0, 4), (4, 4)), ((8, 4),)], 1)[0])
    assert [[span.first_key for span in batch] for batch in level] == [[0], [4, 8]]

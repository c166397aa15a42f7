"""What a plan is made about where data and weights are not here: how many samples, and bytes of a weight."""

from __future__ import annotations

import pytest

from tempsamp_fast.config import DataConfig, ModelConfig
from tempsamp_fast.planning.subject import training_data, value_size


@pytest.mark.parametrize(("few", "queries", "number"), [(None, "all", 12408), (100, "all", 232), (100, "one", 100)])
def test_few_videos_have_their_share_of_the_published_queries(few: int | None, queries: str, number: int) -> None:
    """Charades-STA has 12408 about 5338 videos."""
    data = DataConfig(
        annotations="charades-train",
        videos="nowhere",
        few_shot_videos=few,
        few_shot_queries=queries,  # type: ignore[arg-type]
    )
    found = training_data(data)
    assert found.num_samples == number
    assert found.queries == pytest.approx((1.0 if queries == "one" else 12408 / 5338,))


@pytest.mark.parametrize(
    ("model", "dtype", "has_gpu", "num_bytes"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "auto", False, 2),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "float32", True, 4),
        ("tiny", "auto", False, 4),
        ("tiny", "auto", True, 2),
        ("tiny", "bfloat16", False, 2),
    ],
)
def test_a_weight_has_the_bytes_that_it_will_have_in_the_run(
    monkeypatch: pytest.MonkeyPatch, model: str, dtype: str, has_gpu: bool, num_bytes: int
) -> None:
    """A published model is not planned for the machine without a GPU that the plan is made on."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert value_size(ModelConfig(model=model, dtype=dtype)) == num_bytes  # type: ignore[arg-type]

"""Two ranks that sample and evaluate from partitioned parameters do what one plain rank does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.slow
def test_partitioned_parameters_draw_and_answer_as_whole_ones(trainer, clips: Path, tmp_path: Path) -> None:
    """Three queries over two ranks: one of them has a batch less than the other, and all sample as often."""
    words = ("--phases", "grpo:2", "--eval_annotations", str(clips / "annotations/test.json"))
    words += ("--max_eval_samples", "3", "--eval_batch_size", "1")
    plain = ("--gradient_accumulation_steps", "2", "--record_rollouts", str(tmp_path / "plain.jsonl"))
    trainer.main(tmp_path / "plain", *words, *plain)
    partitioned = ("--gradient_accumulation_steps", "1", "--zero_stage", "3")
    trainer.launch(
        tmp_path / "partitioned", 2, *words, *partitioned, "--record_rollouts", str(tmp_path / "partitioned.jsonl")
    )
    drawn = {name: sorted((tmp_path / f"{name}.jsonl").read_text().splitlines()) for name in ("plain", "partitioned")}
    assert drawn["partitioned"] == drawn["plain"]
    for stage in ("start", "1_grpo_answer"):
        answers = [
            [json.loads(line)["text"] for line in (tmp_path / run / f"eval/{stage}_answer.jsonl").open()]
            for run in ("partitioned", "plain")
        ]
        assert answers[0] == answers[1] and len(answers[0]) == 3

"""A run that samples through (the double of) vLLM trains like one that samples from its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollout import vllm_double


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"])
def test_prompts_are_read_alike_and_greedy_evaluations_agree(
    trainer, clips: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real tokenizer and chat template; prompts that differed would be refused."""
    vllm_double.install(monkeypatch)
    words = ("--phases", "grpo:1", "--model", "tiny", "--tiny_family", family, "--max_eval_samples", "2")
    words += ("--eval_annotations", str(clips / "annotations/test.json"), "--record_rollouts")
    recorded = {}
    for backend in ("policy", "vllm"):
        folder = tmp_path / backend
        trainer.main(folder, *words, str(tmp_path / f"{backend}.jsonl"), "--rollout_backend", backend)
        recorded[backend] = (folder / "eval/start_answer.jsonl").read_text()
        assert (tmp_path / f"{backend}.jsonl").read_text().count("\n") == 2
    assert recorded["vllm"] == recorded["policy"]

"""A run that samples through (the double of) vLLM trains like one that samples from its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from tempsamp_fast.rollout.vllm import VllmBackend
from tests.rollout import vllm_double


@pytest.mark.parametrize("family", [pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "qwen3_vl"])
def test_prompts_are_read_alike_and_greedy_evaluations_agree(
    trainer, clips: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real tokenizer and chat template; prompts that differed would be refused. So do log-probs agree."""
    vllm_double.install(monkeypatch)
    words = ("--phases", "grpo:1", "--model", "tiny", "--tiny_family", family, "--max_eval_samples", "2")
    words += ("--beta", "0.04", "--temperature", "0.7")
    words += ("--eval_annotations", str(clips / "annotations/test.json"), "--record_rollouts")
    recorded = {}
    for backend in ("policy", "vllm"):
        folder = tmp_path / backend
        rows = trainer.main(folder, *words, str(tmp_path / f"{backend}.jsonl"), "--rollout_backend", backend)
        recorded[backend] = (folder / "eval/start_answer.jsonl").read_text()
        assert (tmp_path / f"{backend}.jsonl").read_text().count("\n") == 2
        assert [row["rollout/logp_gap"] < 1e-5 for row in rows if "loss" in row] == [True]
    assert recorded["vllm"] == recorded["policy"]


def test_weights_that_do_not_reach_vllm_end_the_run(
    trainer, refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_double.install(monkeypatch)
    sync, synced = VllmBackend.sync_weights, []

    def sync_once(backend: VllmBackend) -> None:
        if not synced:
            sync(backend)
        synced.append(backend)

    monkeypatch.setattr(VllmBackend, "sync_weights", sync_once)
    words = ("--phases", "tempsamp:3@1e-2", "--rollout_backend", "vllm", "--max_logp_gap", "0.01")
    assert "is above max_logp_gap=0.01" in refused(trainer.flags(tmp_path / "run", *words))
    assert len(synced) == 2

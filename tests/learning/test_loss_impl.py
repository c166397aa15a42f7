"""The Triton kernels against their PyTorch twins inside the trainer: the same answers, losses and gradient norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not triton.knobs.runtime.interpret,
    reason="the Triton kernels need CUDA or TRITON_INTERPRET=1",
)

COMPARED = ("loss", "optim/grad_norm", "policy/logp", "policy/entropy", "policy/kl", "policy/ratio_max")


ONE_STEP, TWENTY_STEPS = "tempsamp:1", "sft:5,grpo:5,tempsamp:10"


@pytest.mark.parametrize(
    ("phases", "beta"),
    [
        (ONE_STEP, "0.04"),
        pytest.param(TWENTY_STEPS, "0.04", marks=pytest.mark.slow),
        pytest.param(TWENTY_STEPS, "0", marks=pytest.mark.slow),
    ],
)
def test_both_implementations_train_alike(stepper, tmp_path: Path, phases: str, beta: str) -> None:
    """With beta 0, the answers of a group that all earn the same leave the backward GEMMs."""
    recorded = tmp_path / "rollouts.jsonl"
    words = (
        *("--phases", phases, "--shaping", "anchor", "--beta", beta, "--gradient_accumulation_steps", "1"),
        *(
            "--max_completion_length",
            "4",
            "--num_generations",
            "2",
            "--updates_per_batch",
            "2",
            "--learning_rate",
            "1e-4",
        ),
    )
    expected = stepper(*words, "--loss_impl", "torch", "--record_rollouts", str(recorded)).steps()
    found = stepper(*words, "--loss_impl", "triton", "--replay_rollouts", str(recorded)).steps()
    assert len(found) == len(expected)
    for name in COMPARED:
        ours, theirs = ({i: step[name] for i, step in enumerate(steps) if name in step} for steps in (found, expected))
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7), name

"""What ranks say to each other in a step, counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.traffic import Traffic


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (("--zero_stage", "1"), 1),
        (("--zero_stage", "2"), 1),
        (("--zero_stage", "2", "--reduce_gradients", "step"), 1),
        (("--zero_stage", "2", "--reduce_gradients", "row"), 3),
    ],
)
def test_zero_2_sums_gradients_over_ranks_once_a_step_or_in_every_row(
    stepper: Callable, words: tuple[str, ...], times: int
) -> None:
    """A step of three rows, by a process that is all of its ranks: the weights move alike however often they sum."""
    steps = ("--phases", "sft:1", "--gradient_accumulation_steps", "3", "--learning_rate", "1e-3")
    ours, theirs = stepper(*steps, *words), stepper(*steps)
    parameters = [each for each in ours.run.policy.parameters() if each.requires_grad]
    num_bytes = sum(each.nbytes for each in parameters)  # the head is the embedding, and travels once
    with Traffic() as seen:
        ours.steps()
    theirs.steps()
    assert times * num_bytes <= seen.bytes["all_reduce"] < times * num_bytes + 1e4
    torch.testing.assert_close(ours.weights(), theirs.weights(), rtol=1e-5, atol=2e-6)

"""One token of the delta rule in place: the kernel, its twin, and the rule as the paper writes it."""

from __future__ import annotations

import pytest
import torch

from tempsamp_fast.rollout.delta_step import delta_step
from tests.model.test_linear_layers import inputs, token_by_token

NUM_ROWS = 3


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dims", [(16, 64), (6, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_the_rule(impl: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """For every row by itself, states of float32 whatever the dtype of what is read."""
    *tokens, state = (each.detach().float() for each in inputs(1, batch=NUM_ROWS, dims=dims))
    tokens = [each.to(dtype) for each in tokens]
    expected, expected_state = token_by_token(*(each.float() for each in tokens), state)
    own = state.clone()
    output = delta_step(own, torch.arange(NUM_ROWS), *(each[:, 0] for each in tokens), impl=impl)
    assert output.dtype == dtype
    rough = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(output.float(), expected[:, 0], **rough)
    torch.testing.assert_close(own, expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_step_of_some_rows_changes_their_states_alone(impl: str) -> None:
    *tokens, state = (each.detach().float() for each in inputs(1, batch=NUM_ROWS, dims=(6, 5)))
    _, expected = token_by_token(*tokens, state)
    own, slots = state.clone(), torch.tensor([0, 2])
    delta_step(own, slots, *(each[slots, 0] for each in tokens), impl=impl)
    torch.testing.assert_close(own[slots], expected[slots], rtol=1e-5, atol=1e-5)
    assert torch.equal(own[1], state[1])

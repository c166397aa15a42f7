"""How kernels are started: on their tensors' device, with vectors they can index, and under torch.compile."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tempsamp_kernels
import torch
from tempsamp_kernels import fused_linear_grpo_loss, linear_logprob, triton_grpo_loss
from tempsamp_kernels import launch as launching

PACKAGE = Path(tempsamp_kernels.__file__).parent


def test_every_kernel_is_started_by_launch():
    """Nowhere else is a kernel given a grid: `kernel[grid](...)`."""
    for path in PACKAGE.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        started = [
            node for node in calls if isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func)
        ]
        assert len(started) == (path.name == "launch.py"), path.name


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    """Whichever is the current one; nothing is switched on a CPU."""
    entered = MagicMock(return_value=nullcontext())
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(launching, "Tensor", SimpleNamespace)
    kernel = MagicMock()
    second = SimpleNamespace(ndim=2, device=torch.device("cuda", 1))
    launching.launch(kernel, (3,), values_ptr=second, count=3)
    entered.assert_called_once_with(torch.device("cuda", 1))
    kernel[(3,)].assert_called_once_with(values_ptr=second, count=3)
    launching.launch(kernel, (3,), values_ptr=SimpleNamespace(ndim=2, device=torch.device("cpu")))
    entered.assert_called_once()


def test_an_empty_grid_starts_nothing():
    launching.launch(None, (0,), values_ptr=torch.empty(0))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_compiled_step_over_held_logits_gives_the_gradients_of_an_eager_one(inplace, backend):
    """`inplace=True` is the default and only a permission: a compiled backward takes memory of its own."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 4, 8), torch.randn(11, 8)
    ids, advantages, old = torch.randint(11, (2, 3)), torch.randn(2), torch.randn(2, 3) - 2

    def step(x):
        per_token, *_ = triton_grpo_loss(
            x @ weight.T, old, None, ids, advantages, beta=0.0, inplace=inplace, impl="torch"
        )
        return per_token.sum()

    eager, compiled = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    step(eager).backward()
    torch.compile(step, backend=backend)(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab_size", [37, pytest.param(48, marks=pytest.mark.slow)])
def test_a_step_from_hidden_states_compiles_into_one_graph_with_the_gradients_of_an_eager_one(vocab_size, backend):
    """The loss in two chunks, of which one is padded, and the log-prob with its entropy."""
    torch.manual_seed(0)
    leaves = torch.randn(5, 8, requires_grad=True), torch.randn(vocab_size, 8, requires_grad=True)
    ids, row_ids, advantages = torch.randint(vocab_size, (5,)), torch.tensor([0, 0, 1, 1, 1]), torch.randn(2)

    def step(x, w):
        counts = torch.tensor([True] * 4 + [False])
        options = {"advantages": advantages, "temperature": 0.9, "mask": counts, "live_rows": counts}
        loss, _ = fused_linear_grpo_loss(x, w, ids, row_ids, num_rows=2, chunk_size=3, impl="torch", **options)
        logp, entropy = linear_logprob(x, w, ids, temperature=0.9, chunk_size=3, impl="torch")
        return loss + logp.sum() + entropy.sum()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    found, expected = (torch.autograd.grad(function(*leaves), leaves) for function in (compiled, step))
    torch.testing.assert_close(found, expected)

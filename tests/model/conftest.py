"""`oracle`: the plain model, one row per answer, that packed rows are compared with.

`exact`: the same in double precision throughout, where only rounding of 1e-16 is left to differ.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.model.packing import PackedRow
from tempsamp_fast.model.policy import Policy
from tests.conftest import Tiny

DECAYS = ("A_log", "dt_bias", "in_proj_a.weight")


@dataclass(frozen=True)
class Pass:
    """What one forward and backward pass over all answers gives."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


class Oracle:
    """What is right, and how far from it something is."""

    decay_rtol = 1e-2
    """Of gradients of the decays, nearly all of which cancels in float32; in float64 they are as exact as others."""

    def __init__(self, rtol: float = 2e-5) -> None:
        self.rtol = rtol

    def model(self, tiny: Tiny) -> PreTrainedModel:
        """In float32."""
        return tiny.model()

    def plain_logits(self, model: PreTrainedModel, groups: Sequence[RolloutGroup]) -> Tensor:
        """transformers' own forward, one row per answer, positions explicit; [M, vocab] in packing order."""
        pieces = []
        for group in groups:
            video = group.prompt.video
            positions, start = mrope_positions(
                group.prompt.input_ids, [video.grid_thw], [video.second_per_grid], model.config
            )
            for completion in group.completions:
                length = len(completion.ids)
                answer_positions = torch.arange(start, start + length).expand(3, -1)
                logits = model(
                    input_ids=torch.cat([group.prompt.input_ids, completion.ids])[None],
                    position_ids=torch.cat([positions, answer_positions], dim=1)[:, None],
                    pixel_values_videos=video.pixel_values,
                    video_grid_thw=torch.tensor([video.grid_thw]),
                    use_cache=False,
                ).logits
                pieces.append(logits[0, -length - 1 : -1])
        return torch.cat(pieces)

    def packed_logits(self, policy: Policy, rows: Sequence[PackedRow]) -> Tensor:
        return torch.cat([policy(row, lambda hidden, weight: hidden @ weight.T) for row in rows])

    def plain_pass(self, tiny, groups: Sequence[RolloutGroup]) -> Pass:
        model = self.model(tiny)
        token_ids = torch.cat([completion.ids for group in groups for completion in group.completions])
        return self._backward(model, self.plain_logits(model, groups), token_ids)

    def packed_pass(self, policy: Policy, rows: Sequence[PackedRow]) -> Pass:
        token_ids = torch.cat([row.token_ids for row in rows])
        return self._backward(policy.train().base_model, self.packed_logits(policy, rows), token_ids)

    def _backward(self, model: PreTrainedModel, logits: Tensor, token_ids: Tensor) -> Pass:
        """Of a loss that weighs every predicted token differently, with either sign."""
        weights = torch.randn(len(token_ids), generator=torch.Generator().manual_seed(5))
        loss = -(weights * logits.log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]).sum()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        return Pass(logits.detach(), loss.detach(), gradients)

    def error(self, actual: Tensor, expected: Tensor) -> float:
        """Largest difference, relative to the largest expected value."""
        difference = (actual - expected).detach().abs().max()
        return float(difference / expected.detach().abs().max().clamp_min(1e-6))

    def assert_close(self, actual: Tensor, expected: Tensor, name: str = "") -> None:
        rtol = self.decay_rtol if name.endswith(DECAYS) else self.rtol
        assert self.error(actual, expected) < rtol, f"{name}: relative error {self.error(actual, expected):.1e}"

    def assert_same(self, actual: Pass, expected: Pass) -> None:
        """Logits, loss and the gradient of every parameter, each of which must have one."""
        self.assert_close(actual.logits, expected.logits, "logits")
        self.assert_close(actual.loss, expected.loss, "loss")
        assert actual.gradients.keys() == expected.gradients.keys()
        for name, gradient in expected.gradients.items():
            assert gradient is not None and gradient.abs().max() > 0, f"{name} is not exercised"
            self.assert_close(actual.gradients[name], gradient, name)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


class ExactOracle(Oracle):
    """In float64; what transformers itself computes in float32 too, as `exact` sees to."""

    decay_rtol = 1e-10

    def model(self, tiny: Tiny) -> PreTrainedModel:
        model = tiny.model().double()
        if "moe" in tiny.family:
            model.set_experts_implementation("eager")
        return model

    def groups(self, tiny: Tiny) -> list[RolloutGroup]:
        """Those of all tests, and a prompt and an answer longer than a chunk of the linear layers, and no multiple."""
        return [*tiny.groups(), tiny.group(tiny.prompt((5, 6, 8), num_text=30, seed=4), [70, 1, 5], seed=14)]

    @cache  # noqa: B019
    def expected(self, family: str) -> Pass:
        """Of `groups`, by the plain model."""
        tiny = Tiny(family)
        return self.plain_pass(tiny, self.groups(tiny))


class _Double:
    """torch, in which float32 means float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


EXACT = ExactOracle(1e-10)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> ExactOracle:
    to_float = torch.Tensor.float
    in_float = lambda self: self.double() if self.dtype in (torch.int64, torch.float64) else to_float(self)
    monkeypatch.setattr(torch.Tensor, "float", in_float)
    for family in FAMILIES.values():
        monkeypatch.setattr(sys.modules[family.model_class.__module__], "torch", _Double())
    return EXACT

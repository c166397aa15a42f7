"""Packed completions and a naive fp64 loss over their full logits, which every implementation must reproduce."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class PackedBatch:
    """Completions end to end, with old and reference policies far enough to reach every bound."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    token_ids: Tensor
    row_ids: Tensor
    advantages: Tensor
    is_off_policy: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    mask: Tensor

    @classmethod
    def random(cls, lengths, vocab_size=37, hidden_size=8, seed=0, spread=0.5, masked=0.2, peak=0.0) -> PackedBatch:
        """`peak` nats are added to every second target's margin."""
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        num_tokens, num_rows = sum(lengths), len(lengths)
        hidden, weight, bias = (
            normal(num_tokens, hidden_size),
            normal(vocab_size, hidden_size),
            0.1 * normal(vocab_size),
        )
        token_ids = torch.randint(vocab_size, (num_tokens,), generator=generator)
        if peak:
            target = weight[token_ids[::2]]
            hidden[::2] += peak * target / target.square().sum(-1, keepdim=True)
        logps = torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, token_ids[:, None])[:, 0]
        batch = cls(
            hidden,
            weight,
            bias,
            token_ids,
            torch.repeat_interleave(torch.arange(num_rows), torch.tensor(lengths, dtype=torch.int64)),
            normal(num_rows),
            torch.arange(num_rows) % 3 == 2,
            logps + spread * normal(num_tokens),
            logps + spread * normal(num_tokens),
            torch.rand(num_tokens, generator=generator) >= masked,
        )
        return cls(**{name: value.to(DEVICE) for name, value in vars(batch).items()})

    def learned(self, dtype: torch.dtype | None = None) -> PackedBatch:
        """A copy whose hidden states, head and bias take gradients."""
        fresh = {name: getattr(self, name).to(dtype) for name in ("hidden", "weight", "bias")}
        return replace(self, **{name: value.detach().clone().requires_grad_() for name, value in fresh.items()})

    def gradients(self) -> list[Tensor]:
        return [self.hidden.grad, self.weight.grad, self.bias.grad]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.token_ids, self.row_ids

    def policies(self) -> dict[str, Tensor]:
        names = ("is_off_policy", "old_logps", "ref_logps", "mask", "bias")
        return {name: getattr(self, name) for name in names}


def naive_logps(batch: PackedBatch, temperature=1.0, softcap=None, logit_scale=1.0) -> tuple[Tensor, Tensor]:
    logits = (batch.hidden @ batch.weight.T + batch.bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, -1)
    logps = log_probs.gather(-1, batch.token_ids[:, None])[:, 0]
    return logps, -(log_probs.exp() * log_probs).sum(-1)


def naive_loss(
    batch: PackedBatch,
    loss_type="grpo",
    level="token",
    beta=0.04,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    dual_clip=None,
    kl_type="k3",
    off_policy_ratio="detach",
    off_policy_kl=True,
    max_completion_length=None,
    row_mask=None,
    importance_weights=None,
    importance_cap=None,
    importance_mode="truncate",
    entropy_coef=0.0,
    entropy_threshold=-torch.inf,
    cispo_low=None,
    log_ratio_clamp=torch.inf,
    kl_clamp=torch.inf,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    vespo_k_pos=2.0,
    vespo_lambda_pos=3.0,
    vespo_k_neg=3.0,
    vespo_lambda_neg=2.0,
    **head,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss as the papers write it, row by row over full logits; also ratio, KL and branch of each token."""
    logps, entropy = naive_logps(batch, **head)
    rows, total, kept = [], 0.0, {"logp": [], "ratio": [], "kl": [], "branch": []}
    counts = batch.mask if row_mask is None else batch.mask & row_mask[batch.row_ids]
    num_tokens = counts.sum().clamp(min=1)
    for row, advantage in enumerate(batch.advantages.double()):
        of_row = batch.row_ids == row
        index = (of_row & counts).nonzero()[:, 0]
        logp, count = logps[index], max(1, len(index))
        detached = batch.is_off_policy[row] and off_policy_ratio == "detach"
        log_ratio = logp - (logp.detach() if detached else batch.old_logps[index].double())
        importance = 1.0
        if importance_weights is not None:
            importance = importance_weights[index].double()
            beyond = importance > (importance_cap or torch.inf)
            importance = importance.masked_fill(beyond, importance_cap or 0.0 if importance_mode == "truncate" else 0.0)
        if loss_type == "vespo":
            log_w = log_ratio.detach().sum()
            if importance_weights is not None:
                log_w, importance = log_w + importance.log().sum(), 1.0
            w = log_w.clamp(-18.420680743952367, 20).exp()
            k, rate = (vespo_k_pos, vespo_lambda_pos) if advantage >= 0 else (vespo_k_neg, vespo_lambda_neg)
            advantage = advantage * w**k * torch.exp(rate * (1 - w))
        if level != "token":
            log_ratio = (log_ratio.sum() / count).expand_as(logp)
        if level == "sequence_token":
            log_ratio = log_ratio.detach() + logp - logp.detach()
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
        ratio = log_ratio.exp()
        capped = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        branch = torch.where(capped * advantage <= clipped * advantage, 0, 1) + 2 * (capped < ratio)
        if loss_type == "sft":
            loss = -logp
        elif loss_type == "cispo":
            loss = -ratio.clamp(cispo_low, epsilon_high).detach() * advantage * logp
        elif loss_type == "sapo":
            temperature = sapo_temperature_pos if advantage > 0 else sapo_temperature_neg
            loss = -4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantage
        elif loss_type == "vespo":
            loss = -advantage * logp
        else:
            loss = -torch.minimum(capped * advantage, clipped * advantage)
            if dual_clip is not None and advantage < 0:
                branch = branch + 4 * (loss > -dual_clip * advantage)
                loss = loss.clamp(max=-dual_clip * advantage)
        is_kept = entropy[index].detach() >= entropy_threshold
        loss = (loss * importance - entropy_coef * entropy[index]) * is_kept
        gap = (logp - batch.ref_logps[index].double()).clamp(-log_ratio_clamp, log_ratio_clamp)
        kl = {"k1": gap, "k2": 0.5 * gap**2, "k3": torch.expm1(-gap) + gap}[kl_type.removesuffix("_corrected")]
        if kl_type.endswith("_corrected"):
            kl = kl * ratio
        kl = kl.clamp(-kl_clamp, kl_clamp)
        paid = 0.0 if batch.is_off_policy[row] and not off_policy_kl else beta
        loss = loss + paid * kl
        if loss_type in ("grpo", "sapo", "sft"):
            total = total + loss.sum() / count / len(batch.advantages)
        elif loss_type == "luspo":
            total = total + loss.sum() / len(batch.advantages)
        elif loss_type == "dr_grpo":
            total = total + loss.sum() / len(batch.advantages) / max_completion_length
        else:
            total = total + loss.sum() / num_tokens
        rows.append(index)
        for name, value in {"logp": logp, "ratio": ratio, "kl": kl, "branch": branch}.items():
            kept[name].append(value.detach())
    details = {name: torch.cat(values) for name, values in kept.items()}
    return total, {**details, "index": torch.cat(rows), "entropy": entropy.detach()[torch.cat(rows)]}


@pytest.fixture(scope="session", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    """Minimum and maximum of two numbers drop NaN as on a GPU; those of numpy, which is interpreted with, keep it.

    Along an axis the interpreter drops it by itself.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, ufunc in {"create_minnumf": np.fmin, "create_maxnumf": np.fmax}.items():
            patch.setattr(InterpreterBuilder, name, lambda self, a, b, ufunc=ufunc: self.binary_op(a, b, ufunc))
        yield


@pytest.fixture(scope="session")
def packed():
    """`PackedBatch.random`."""
    return PackedBatch.random


@pytest.fixture(scope="session")
def naive():
    """`naive_loss`, which takes a batch in fp64."""
    return naive_loss


@pytest.fixture(scope="session")
def naive_logprobs():
    """`naive_logps`, which takes a batch in fp64."""
    return naive_logps

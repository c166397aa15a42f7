"""What a rank of `test_sequence_parallel.py` checks: rows that ranks share against the same rows on one, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from tempsamp_fast.batch import RolloutGroup
from tempsamp_fast.learning.vision_features import with_vision_features
from tempsamp_fast.model.packing import PackedRow, idle_row, pack
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.model.sequence_parallel import sequence_group, share_out
from tempsamp_fast.system.device import join_ranks
from tests.conftest import Tiny
from tests.model.conftest import ExactOracle


def head_of(row: PackedRow, first: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss to which every answer adds with a weight of its own. first: the first answer's number in the whole row."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = (hidden @ weight.T).log_softmax(-1).gather(-1, row.token_ids[:, None])[:, 0]
        return -(logps * (1.0 + row.row_ids + first)).sum()

    return head


def gradients(policy: Policy) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]


def largest_error(policy: Policy, row: PackedRow, group: Any) -> tuple[float, float]:
    """Of loss and gradients, relative to the largest value of each."""
    policy.zero_grad()
    expected = policy(row, head_of(row))
    expected.backward()
    whole = gradients(policy)
    policy.zero_grad()
    share = share_out(row, group, policy.config)
    loss = policy(share, head_of(share, share.shares.answers.start if share.shares else 0))
    loss.backward()
    total = loss.detach().clone()
    ours = gradients(policy)
    for tensor in (total, *ours):
        dist.all_reduce(tensor, group=group)
    distances = [
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(ours, whole, strict=True) if b.any()
    ]
    assert len(distances) > 20
    return abs(float((total - expected) / expected)), max(distances)


def doubled(groups: Sequence[RolloutGroup]) -> Sequence[RolloutGroup]:
    for group in groups:
        object.__setattr__(group.prompt.video, "pixel_values", group.prompt.video.pixel_values.double())
    return groups


def main(words: list[str]) -> None:
    """words: file for the errors, families."""
    torch.set_num_threads(1)
    join_ranks("gloo")
    deepspeed.init_distributed("gloo", verbose=False)
    group = sequence_group(dist.get_world_size())
    errors = {}
    for family in words[1:]:
        tiny = Tiny(family)
        for checkpointed in (False, True):
            policy = Policy(ExactOracle().model(tiny), gradient_checkpointing=checkpointed)
            config = policy.config
            rows = {
                "groups": pack(doubled(tiny.groups()), config=config, max_tokens_per_row=10_000),
                "trees": pack(doubled(tiny.tree_groups()), config=config, max_tokens_per_row=10_000),
                "a group a row": pack(doubled(tiny.groups()), config=config, max_tokens_per_row=50),
            }
            for name, packed in rows.items():
                assert name == "a group a row" or len(packed) == 1
                for row in packed:
                    errors[f"{family}, {name}, checkpointed={checkpointed}"] = largest_error(policy, row, group)
        policy.base_model.model.visual.requires_grad_(False)
        prompts = with_vision_features(policy, [each.prompt for each in doubled(tiny.groups())])
        frozen = [RolloutGroup(p, each.completions) for p, each in zip(prompts, tiny.groups(), strict=True)]
        (row,) = pack(frozen, config=config, max_tokens_per_row=10_000)
        errors[f"{family}, frozen tower"] = largest_error(policy, row, group)
        idle = share_out(idle_row(config, has_features=True), group, config)
        policy(idle, lambda hidden, weight: (0 * hidden @ weight.T).sum()).backward()
    if dist.get_rank() == 0:
        Path(words[0]).write_text(json.dumps(errors))

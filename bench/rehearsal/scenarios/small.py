"""An update and two rollouts of 3B cut to two layers: enough to see a wait or a wrong copy come back."""

from __future__ import annotations

from typing import Any

from bench.gpu_sections.update import losses
from bench.rehearsal.ledger import LEDGER
from bench.rehearsal.scenarios import rollouts
from bench.rehearsal.scenarios.models import Shape, model_of, rows_of
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.policy import Policy
from tempsamp_fast.rollout.decoding import GraphDecoder


def play() -> dict[str, Any]:
    with LEDGER.phase("build"):
        model = model_of("3B", 2)
    apply_liger_layers(model, "on")
    policy = Policy(model, gradient_checkpointing=True).train()
    for _ in range(2):  # facts about grids are made in the first pass
        (row,) = [each.to("cuda") for each in rows_of(policy.config, Shape())]
        with LEDGER.phase("small update"):
            losses(policy, [row])[0]().backward()
    ending, going_on, decoder = rollouts.Case(2, False, True), rollouts.Case(1, True), GraphDecoder()
    found = {
        str(ending): rollouts.sample("small", policy, ending),
        str(going_on): rollouts.sample("small", policy, going_on, decoder),
    }
    if rollouts.sample("small, again", policy, going_on, decoder)["record_ms"]:
        LEDGER.violations.append("a CUDA graph was recorded again, in a rollout like the one before")
    return found

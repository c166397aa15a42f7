"""What of the rehearsal needs no CUDA build of torch: its books, its rules, its traps and its committed figures."""

from __future__ import annotations

import ast
import gc
import json
import re
from pathlib import Path

import pytest
import torch

from bench.rehearsal import rules
from bench.rehearsal.costs import num_bytes, work_of
from bench.rehearsal.ledger import CAUTIOUS, LEDGER, REPLAYED, ROOFLINE, Ledger, Work, inside, place
from bench.rehearsal.rules import ALLOWED_WAITS, TIMED, failures
from bench.rehearsal.traps import TRAPS
from tempsamp_fast.model.layout import GroupLayout
from tempsamp_fast.model.varlen_attention import VarlenAttention
from tempsamp_fast.planning.forecast import read_measured

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "bench" / "results" / "rehearsal.json"


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    fresh = Ledger()
    monkeypatch.setattr(rules, "LEDGER", fresh)
    monkeypatch.setattr(rules, "COMPILED", {})
    return fresh


def test_seconds_are_those_of_the_slowest_of_flops_bytes_and_launches() -> None:
    assert ROOFLINE.seconds(Work(1, flops=800e12)) == 1.0
    assert ROOFLINE.seconds(Work(1, bytes=3e12)) == 1.0
    assert ROOFLINE.seconds(Work(4)) == pytest.approx(20e-6) and REPLAYED.seconds(Work(4)) == pytest.approx(8e-6)
    assert CAUTIOUS.seconds(Work(1, flops=350e12, kind="flash")) == 1.0
    assert CAUTIOUS.seconds(Work(1, flops=300e12, kind="flash_bwd")) == 1.0


def test_attention_costs_what_is_attended() -> None:
    """Of a prompt of 5 and answers of 2 and 4: each answer sees the prompt and itself."""
    meta, seen = torch.device("meta"), []

    def kernel(query, key, value, *bounds, **_):
        seen.extend([query, key, value, *bounds])
        return query

    attention = VarlenAttention([GroupLayout(5, (2, 4))], device=torch.device("cpu"), kernel=kernel)
    attention(0, *(torch.zeros(1, heads, 11, 8) for heads in (4, 2, 2)), 1.0)
    query, key, value, cu_q, cu_k, max_q, max_k = seen
    work = work_of("_varlen_attn", (query, key, value, cu_q, cu_k, max_q, max_k, True), {}, [], lambda tensor: tensor)
    pairs = 5 * 6 / 2 + (2 * 5 + 3) + (4 * 5 + 10)
    assert work.flops == 4 * 4 * 8 * pairs and work.kind == "flash"
    assert num_bytes(torch.empty(3, 1, 4, device=meta).expand(3, 7, 4)) == 48


def test_memory_is_held_until_it_is_dropped(ledger: Ledger) -> None:
    with ledger.phase("all") as phase:
        tensor = torch.zeros(1000)
        ledger.hold(tensor)
        ledger.hold(tensor[10:])
        assert ledger.live == phase.peak == 4096
        del tensor
        gc.collect()
    assert (ledger.live, phase.peak) == (0, 4096)


def test_a_graph_counts_at_its_replays_and_records_no_wait(ledger: Ledger) -> None:
    with ledger.phase("all") as phase:
        ledger.capturing = []
        ledger.launch("mm", Work(1, flops=64.0))
        ledger.wait("a read")
        recorded, ledger.capturing = ledger.capturing, None
        assert phase.launches == 0
        ledger.replay(recorded)
    assert (phase.launches, phase.flops) == (2, 64.0)
    assert "cannot record a wait" in ledger.violations[0]


def test_a_wait_fails_unless_its_place_is_allowed(ledger: Ledger) -> None:
    with ledger.phase("update"):
        ledger.wait("a read")
    (complaint,) = failures({})
    assert "test_rehearsal.py test_a_wait_fails_unless_its_place_is_allowed: ledger.wait" in complaint


def test_peaks_far_from_the_plan_and_many_launches_fail(ledger: Ledger) -> None:
    assert not failures({"3B": {"peak_gib": 60.0, "planned_gib": 63.0, "waits_per_token": 1.0}})
    complaints = failures({"3B": {"peak_gib": 60.0, "planned_gib": 70.0, "launches_per_token": 10**5}})
    assert len(complaints) == 2 and all(line.startswith("3B: ") for line in complaints)


def test_a_place_names_file_function_and_code() -> None:
    assert place().startswith("tests/test_rehearsal.py test_a_place_names_file_function_and_code: assert place()")
    assert inside("test_a_place_names_file_function_and_code") and not inside("elsewhere")
    assert not LEDGER.phases


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.name)
def test_every_trap_can_be_put_back(trap) -> None:
    text = (REPOSITORY / trap.file).read_text()
    assert text.count(trap.right) == 1 and trap.wrong not in text
    ast.parse(text.replace(trap.right, trap.wrong))


def test_allowed_waits_are_in_functions_that_exist() -> None:
    sources = [path.read_text() for root in ("tempsamp_fast", "kernels") for path in (REPOSITORY / root).rglob("*.py")]
    for part in ALLOWED_WAITS:
        if part.startswith("deepspeed/"):
            continue
        name = re.split(r"[ .]", part.rstrip(":"))[-1]
        assert any(f"def {name}(" in source for source in sources), part


def test_committed_figures_are_simulated_and_keep_the_rules(ledger: Ledger) -> None:
    """And the plan takes them for step times."""
    document = json.loads(RESULTS.read_text())
    assert document["simulated"] is True and "not measured" in document["what"]
    assert not failures(document["models"])
    assert all(row["spilled"] == 0 or row["kernel"] in TIMED for row in document["kernels"])
    measured = read_measured(RESULTS)
    assert measured.is_simulated and measured.updates and measured.samplings

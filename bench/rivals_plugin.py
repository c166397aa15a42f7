"""A pytest plugin: while Liger-Kernel's own tests run, its class and functions of the GRPO loss are ours.

pytest -p bench.rivals_plugin test/chunked_loss/test_grpo_loss.py

With TEMPSAMP_RIVALS_RECORD=FILE every case's outcome is a line there at once, and cases that stand there are left out;
those of a large shape come last.
"""

import json
import os
from collections import Counter
from pathlib import Path

import liger_kernel.chunked_loss
import liger_kernel.chunked_loss.grpo_loss
import liger_kernel.ops.grpo_loss
import liger_kernel.transformers.grpo_loss
import pytest
from tempsamp_kernels import FusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss

for module, name, ours in (
    (liger_kernel.chunked_loss, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss),
    (liger_kernel.chunked_loss.grpo_loss, "LigerFusedLinearGRPOLoss", FusedLinearGRPOLoss),
    (liger_kernel.transformers.grpo_loss, "triton_grpo_loss", triton_grpo_loss),
    (liger_kernel.ops.grpo_loss, "fused_selective_log_softmax", fused_selective_log_softmax),
):
    setattr(module, name, ours)

RECORD = os.environ.get("TEMPSAMP_RIVALS_RECORD")


def _write(line: dict[str, object]) -> None:
    with Path(RECORD or os.devnull).open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lines = [json.loads(line) for line in Path(RECORD or os.devnull).read_text().splitlines()]
    seen = {line.get("case") for line in lines}
    if not any("collected" in line for line in lines):
        _write({"collected": Counter(item.nodeid.split("::")[0] for item in items)})
    items[:] = sorted((item for item in items if item.nodeid not in seen), key=lambda item: "1024" in item.name)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        message = getattr(report.longrepr, "reprcrash", None)
        outcome = {"case": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        _write(outcome | ({"message": message.message} if message else {}))

"""Every benchmark that passes leaves its figures in `bench/results/<subject>_<cpu or GPU name>.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.run.log import describe_machine, write_json

RESULTS = Path(__file__).with_name("results")


@pytest.fixture(autouse=True)
def keep_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Merge `benchmark.extra_info` into the results file of the benchmark's module, under the benchmark's name."""
    benchmark: Any = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is None or not benchmark.extra_info:
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    subject = request.path.stem.removeprefix("bench_")
    path = RESULTS / f"{subject}_{re.sub(r'[^a-z0-9]+', '_', device.lower())}.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else {}
    kept[request.node.name.removeprefix("test_")] = dict(benchmark.extra_info)
    command = f"pytest {request.path.relative_to(request.config.rootpath)}"
    write_json(path, {"command": command, "machine": describe_machine(), "results": dict(sorted(kept.items()))})

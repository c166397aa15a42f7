"""The runs of minutes on a card: boxes, gates and limits by a clock of their own, and kills at every item."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.gpu_runs import tables
from bench.gpu_runs.orchestrator import DONE, GATE_IS_RED, OVER, Item, Orchestrator, append_line, collected, read_lines
from bench.gpu_runs.perform import environment_of, unpacked
from bench.gpu_runs.worker import WorkerProcess

ROOT = Path(__file__).parents[1]
ITEMS = (Item("probe", "environment", 10, is_gate=True), Item("loss", "loss", 20), Item("more loss", "loss", 30))


class Machine:
    """A clock, and workers on it: each item adds a row every second that it lasts."""

    def __init__(
        self,
        seconds: dict[str, float],
        failing: tuple[str, ...] = (),
        dying: tuple[str, ...] = (),
        spending: tuple[str, ...] = (),
    ) -> None:
        self.now, self.num_started, self.num_ready, self.start_s = 0.0, 0, 0, 0.0
        self.seconds, self.failing, self.dying, self.spending = seconds, failing, dying, spending
        self.killer: Any = lambda item: None

    def start(self) -> Machine:
        self.num_started += 1
        return self

    def begin(self, item: str, rows: Path) -> None:
        assert re.fullmatch(r"[\w.-]+", rows.name), "a name that may not come home"
        self.item, self.rows = item, rows
        self.now += self.start_s if self.num_started > self.num_ready else 0
        self.num_ready = self.num_started
        self.killer(item)

    def wait(self, seconds: float) -> str:
        lasts = self.seconds[self.item]
        took = min(seconds, lasts)
        self.now += took
        error = "ended before its end"
        if lasts <= seconds and self.item not in self.dying:
            error = "ValueError: wrong" if self.item in self.failing else None
        labels = [{"label": f"{self.item} {second}"} for second in range(int(took))]
        self.rows.write_text(json.dumps({"rows": labels, "error": error}))
        if self.item in self.dying:
            return "died"
        if self.item in self.spending:
            return "spent"
        return "done" if lasts <= seconds else "running"

    def kill(self) -> None:
        pass

    def run(self, out: Path, limit_s: float = 100.0) -> int:
        return Orchestrator("first", ITEMS, out, limit_s, self.start, {"gpu": "A GPU"}, lambda: self.now).run()


def lines_of(out: Path) -> dict[str, dict[str, Any]]:
    return {line["item"]: line for line in read_lines(out / "first.jsonl")}


def test_items_leave_a_line_each_and_share_a_worker(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 12, "more loss": 2})
    assert machine.run(tmp_path) == DONE and machine.num_started == 1
    lines = lines_of(tmp_path)
    assert list(lines) == [item.name for item in ITEMS]
    assert [line["seconds"] for line in lines.values()] == [4, 12, 2]
    assert all(line["outcome"] == "done" and line["gpu"] == "A GPU" for line in lines.values())
    assert [path.name for path in tmp_path.iterdir()] == ["first.jsonl"]


def test_an_item_past_its_box_is_stopped_with_its_rows_and_the_rest_goes_on(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 500, "more loss": 2})
    assert machine.run(tmp_path) == DONE and machine.num_started == 2
    lines = lines_of(tmp_path)
    assert lines["loss"]["outcome"] == "stopped" and lines["loss"]["error"] == "stopped after 20 s"
    assert len(lines["loss"]["rows"]) == 20 and lines["more loss"]["error"] is None


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 5, "more loss": 2}, dying=("loss",))
    assert machine.run(tmp_path) == DONE and machine.num_started == 2
    assert lines_of(tmp_path)["loss"]["outcome"] == "died" and lines_of(tmp_path)["loss"]["error"]


def test_a_worker_that_is_spent_is_replaced_and_its_item_is_done(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 5, "more loss": 2}, spending=("loss",))
    assert machine.run(tmp_path) == DONE and machine.num_started == 2
    assert lines_of(tmp_path)["loss"]["outcome"] == "done" and lines_of(tmp_path)["loss"]["error"] is None


def test_a_red_gate_ends_the_run_now_and_when_called_again(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 5, "more loss": 2}, failing=("probe",))
    assert machine.run(tmp_path) == GATE_IS_RED == machine.run(tmp_path)
    assert list(lines_of(tmp_path)) == ["probe"]


def test_an_error_that_is_no_gate_ends_nothing(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 5, "more loss": 2}, failing=("loss",))
    assert machine.run(tmp_path) == DONE and len(lines_of(tmp_path)) == 3


def test_the_limit_of_the_run_cuts_the_last_item(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 12, "more loss": 25})
    assert machine.run(tmp_path, limit_s=36) == DONE
    assert lines_of(tmp_path)["more loss"]["error"] == "stopped after 20 s"
    assert Machine({"probe": 4, "loss": 12}).run(tmp_path / "short", limit_s=30) == OVER
    assert list(lines_of(tmp_path / "short")) == ["probe", "loss"]


def test_a_start_is_not_of_the_items_time_and_one_that_takes_the_rest_leaves_the_item_to_do(tmp_path: Path) -> None:
    machine = Machine({"probe": 4, "loss": 500, "more loss": 2})
    machine.start_s = 30.0
    assert machine.run(tmp_path, limit_s=200) == DONE
    assert [line["seconds"] for line in lines_of(tmp_path).values()] == [4, 20, 2]
    machine = Machine({"probe": 4, "loss": 500, "more loss": 2})
    machine.start_s = 30.0
    assert machine.run(tmp_path / "short", limit_s=75) == OVER
    assert list(lines_of(tmp_path / "short")) == ["probe", "loss"]


@pytest.mark.parametrize("killed", range(len(ITEMS)))
@pytest.mark.parametrize("half_a_line", [False, True])
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, killed: int, half_a_line: bool) -> None:
    machine = Machine({"probe": 4, "loss": 5, "more loss": 2})

    def kill(item: str) -> None:
        if item == ITEMS[killed].name:
            raise KeyboardInterrupt

    machine.killer = kill
    with pytest.raises(KeyboardInterrupt):
        machine.run(tmp_path)
    assert len(lines_of(tmp_path)) == killed
    if half_a_line:
        with (tmp_path / "first.jsonl").open("a") as stream:
            stream.write('{"item": "lo')
    machine.killer = lambda item: None
    assert machine.run(tmp_path) == DONE
    found = read_lines(tmp_path / "first.jsonl")
    assert [line["item"] for line in found] == [item.name for item in ITEMS]


def test_lines_are_collected_by_section(tmp_path: Path) -> None:
    for item, section, error in (("probe", "environment", None), ("a", "loss", None), ("b", "loss", "stopped")):
        line = {"item": item, "section": section, "outcome": "done", "seconds": 1.5, "rows": [{"label": item}]}
        append_line(tmp_path / "first.jsonl", {**line, "error": error, "gpu": "A GPU", "commit": "0123abc"})
    sections = collected([tmp_path / "first.jsonl"])
    assert list(sections) == ["environment", "loss"]
    assert sections["loss"]["rows"] == [{"label": "a"}, {"label": "b"}] and sections["loss"]["seconds"] == 3
    assert sections["loss"]["error"] == "b: stopped" and sections["environment"]["error"] is None
    assert sections["loss"]["commit"] == "0123abc"


def test_both_runs_name_what_there_is_and_fit_their_time() -> None:
    items = [*tables.FIRST, *tables.SECOND]
    assert [item.name for item in items] == list(tables.TABLE)
    assert {item.section for item in items} <= set(gpu.SECTIONS)
    assert [item.name for item in items if item.is_gate] == ["probe", "smoke"]
    for name, run in tables.RUNS.items():
        assert sum(item.box_s for item in run[:-3]) < tables.LIMIT_S[name] < 600


def test_a_run_needs_a_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "A GPU")
    with pytest.raises(SystemExit):
        gpu.main(["first"])
    assert "first needs --out" in capsys.readouterr().err


MINIATURE = """
import os, time
from pathlib import Path

def quick(record):
    record.add("quick", ms=1.0)

def slow(record):
    record.add("before", ms=1.0)
    Path(os.environ["STARTED"]).write_text(str(os.getpid()))
    time.sleep(float(os.environ["SLEEP"]))
    record.add("after", ms=2.0)

def dies(record):
    record.add("last words", ms=1.0)
    os._exit(9)

TABLE = {"probe": quick, "loss": slow, "more loss": dies, "end": quick}
"""
PROGRAM = """
import os, sys
from pathlib import Path
from bench.gpu_runs.orchestrator import Item, Orchestrator
from bench.gpu_runs.worker import WorkerProcess
out = Path(sys.argv[1])
items = [Item("probe", "environment", 60, True), Item("loss", "loss", 60), Item("more loss", "loss", 60),
         Item("end", "step", 60)]
start = lambda: WorkerProcess("miniature:TABLE", out / "log", dict(os.environ))
sys.exit(Orchestrator("first", items, out, 200, start, {}).run())
"""


def test_what_is_carried_along_is_unpacked_beside_it(tmp_path: Path) -> None:
    """Only the run's few files are in the folder that comes home."""
    (tmp_path / "kit/wheels").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "kit/wheels/carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    site = unpacked(tmp_path / "kit")
    assert (site / "carried/__init__.py").is_file() and site.parent == tmp_path / "kit"


@pytest.mark.slow
def test_real_processes_are_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    """The orchestrator in the middle of an item, its worker by an item; the second call does what is left."""
    (tmp_path / "miniature.py").write_text(MINIATURE)
    environment = environment_of(tmp_path) | {"STARTED": str(tmp_path / "started"), "SLEEP": "600"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    first = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "started").read_text()), 0)
            time.sleep(0.1)
    assert list(lines_of(tmp_path)) == ["probe"]
    ended = subprocess.run(command, env=environment | {"SLEEP": "0"}, cwd=ROOT, timeout=200, check=False)
    lines = lines_of(tmp_path)
    assert ended.returncode == DONE
    assert [(name, line["outcome"]) for name, line in lines.items()] == [
        ("probe", "done"), ("loss", "done"), ("more loss", "died"), ("end", "done"),
    ]  # fmt: skip
    assert [row["label"] for row in lines["loss"]["rows"]] == ["before", "after"]
    assert [row["label"] for row in lines["more loss"]["rows"]] == ["last words"]


@pytest.mark.slow
def test_a_worker_that_does_not_start_in_time_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "miniature.py").write_text(MINIATURE)
    monkeypatch.setattr("bench.gpu_runs.worker.START_S", 0.1)
    worker = WorkerProcess("miniature:TABLE", tmp_path / "log", environment_of(tmp_path))
    worker.begin("probe", tmp_path / "probe.json")
    assert worker.wait(60) == "died"
    worker.kill()
    assert not (tmp_path / "probe.json").exists()


@pytest.mark.slow
def test_a_worker_past_its_box_ends_with_all_that_it_started(tmp_path: Path) -> None:
    (tmp_path / "miniature.py").write_text(MINIATURE)
    environment = environment_of(tmp_path) | {"STARTED": str(tmp_path / "started"), "SLEEP": "600"}
    worker = WorkerProcess("miniature:TABLE", tmp_path / "log", environment)
    worker.begin("probe", tmp_path / "probe.json")
    assert worker.wait(60) == "done"
    worker.begin("loss", tmp_path / "loss.json")
    assert worker.wait(1) == "running"
    worker.kill()
    kept = json.loads((tmp_path / "loss.json").read_text())
    assert [row["label"] for row in kept["rows"]] == ["before"] and kept["error"] == "ended before its end"
    with pytest.raises(ProcessLookupError):
        os.killpg(worker._process.pid, 0)

"""The demo: its runs differ in method alone, its table says what they answered, and the base beneath it is the one of
its card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2_5_VLForConditionalGeneration

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import parse_phases
from tempsamp_fast.demo import runs
from tempsamp_fast.demo.__main__ import ARMS, CONSTANT, DIFFERENCES, METRICS, ROWS, compare, demo, table
from tempsamp_fast.demo.pretrain import EASY, SEED, STAGES
from tempsamp_fast.embedded.model import BASE
from tempsamp_fast.embedded.videos import generate
from tempsamp_fast.eval import main as evaluate

MOST_BYTES = 4_000_000


def test_the_base_is_the_file_of_its_card() -> None:
    weights, card = BASE / "model.safetensors", (BASE / "README.md").read_text()
    assert weights.stat().st_size <= MOST_BYTES and not list(BASE.glob("*.bin"))
    assert f"`{hashlib.sha256(weights.read_bytes()).hexdigest()}`" in card
    assert "python -m tempsamp_fast.demo.pretrain OUT" in card and f"seed {SEED}" in card
    assert all(f"`{phases}`" in card for _, phases in STAGES.values())
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE)
    assert model.num_parameters() == pytest.approx(1.1e6, rel=0.2)


def test_the_base_looks_at_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one event in ten seconds it knows when, answering and thinking; by a constant span that is not to be had."""
    data = generate(tmp_path / "data", dataclasses.replace(EASY, num_train=0, num_test=6))
    words = ["--model", str(BASE), "--annotations", str(data / "annotations/test.json"), "--mode", "answer+think"]
    words += ["--videos", str(data / "videos"), "--output", str(tmp_path / "eval"), "--max_completion_length", "64"]
    assert evaluate(words) == 0
    answering, thinking = json.loads((tmp_path / "eval/scores.json").read_text())["rows"]
    assert answering["parse_rate"] == 1 and answering["miou"] > 0.8, answering
    assert thinking["parse_rate"] == 1 and thinking["miou"] > 0.25, thinking


def test_arms_differ_in_nothing_but_their_phases() -> None:
    configs = [parse_args(["--config=demo", f"--phases={phases}"]).as_dict() for phases in ARMS.values()]
    for config in configs:
        first = parse_phases(config["train"].pop("phases"))[0]
        assert (first.modes, first.num_steps, first.learning_rate) == (("answer",), 160, 3e-4)
        assert config == configs[0] and config["train"]["eval_modes"] == "answer+think"
    assert list(ARMS) == ["tempsamp", "sft", "grpo"]  # the longest first: two at a time end together


def test_scores_and_differences_are_over_the_queries() -> None:
    ious: dict[tuple[str, str], list[float | None]] = {
        (row, mode): [0.5, 0.5, 0.5, 0.5] for row in ROWS for mode in ("answer", "think")
    }
    ious[CONSTANT, "answer"] = [0.0, 0.0, 0.5, 0.5]
    ious["TempSamp-R1", "answer"] = [1.0, 0.5, 1.0, None]
    found = compare(ious)
    rows = {(row["after"], row["mode"]): row for row in found["rows"]}
    ours = rows["TempSamp-R1", "answer"]
    assert ours["miou"] == pytest.approx([0.625, 3.182 * 0.4787 / 2], rel=1e-3)
    assert ours["r1@0.7"][0] == 0.5 and ours["parse_rate"][0] == 0.75
    assert rows[CONSTANT, "-"]["miou"][0] == 0.25
    over_constant, over_grpo, *_ = found["differences"]
    assert over_constant["miou"] == pytest.approx([0.375, 3.182 * 0.6292 / 2], rel=1e-3)
    assert over_grpo["miou"][0] == 0.125 and over_grpo["r1@0.7"][0] == 0.5
    text = table({"num_queries": 4, **found})
    assert "TempSamp-R1 over GRPO, asked to answer: mIoU +12.5" in text and "62.5 ± 76.2" in text
    assert len(text.splitlines()) == len(rows) + len(DIFFERENCES) + 3
    assert all(title in text for title in METRICS.values())


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs in the trainer's place: those whose words say `fail` do, others write what a run leaves of two steps."""
    started = []
    code = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True)\n"
        "print('out of luck'); 'fail' in sys.argv[2] and sys.exit(2)\n"
        '(p / \'metrics.jsonl\').write_text(\'{"phase": "sft/answer"}\\n\' * 2 + \'{"phase": "eval"}\\n\')\n'
        "(p / 'summary.json').write_text('{}')"
    )

    def start(folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
        started.append([folder.name, *words])
        with folder.with_suffix(".log").open("a") as log:
            log.write(f"python -m tempsamp_fast.train {' '.join(words)}\n")
            log.flush()
            return subprocess.Popen([sys.executable, "-c", code, str(folder), " ".join(words)], stdout=log)

    monkeypatch.setattr(runs, "_start", start)
    monkeypatch.setattr(runs, "POLL_S", 0.01)
    return started


def test_finished_runs_stay_and_begun_ones_go_on_as_they_began(tmp_path: Path, played: list[list[str]]) -> None:
    words = {name: ["--phases=sft:2", f"--output_dir={name}"] for name in ("one", "two", "three")}
    runs.train_all(tmp_path, words)
    assert played == [[name, *words[name]] for name in words]
    (tmp_path / "two/summary.json").unlink()
    runs.train_all(tmp_path, words)
    assert played[3:] == [["two", *words["two"]]]
    with pytest.raises(ValueError, match=r"one: was begun otherwise \(python -m tempsamp_fast.train --phases=sft:2"):
        runs.train_all(tmp_path, {"one": ["--phases=sft:2", "--seed=1"]})


def test_the_end_of_a_failed_runs_words_is_told(tmp_path: Path, played: list[list[str]]) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)one failed; the end of .*one.log.*out of luck"):
        runs.train_all(tmp_path, {"one": ["--phases=sft:2", "--output_dir=fail"]})


@pytest.mark.slow
def test_a_demo_of_a_step_each(tmp_path: Path) -> None:
    """Goes through the trainer; what it leaves is what the table is made of, and a page."""
    arms = {name: re.sub(r":\d+@", ":1@", phases) for name, phases in ARMS.items()}
    videos = dataclasses.replace(EASY, num_train=12, num_test=4)
    found = demo(tmp_path / "demo", tmp_path / "data", 1, arms, videos)
    assert found == json.loads((tmp_path / "demo/demo.json").read_text()) and found["seed"] == 1
    assert [row["stage"] for row in json.loads((tmp_path / "demo/grpo/summary.json").read_text())["rows"][2:4]] == [
        "1_grpo/answer"
    ] * 2
    assert {row["after"] for row in found["rows"]} == {*ROWS, CONSTANT}
    assert "<h2>Gallery</h2>" in (tmp_path / "demo/report.html").read_text()
    with pytest.raises(ValueError, match="was begun otherwise"):
        demo(tmp_path / "demo", tmp_path / "data", 2, arms, videos)

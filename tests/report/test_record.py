"""groups.jsonl: what a run writes is what the report reads, also after a resumption."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Completion, RolloutGroup
from tempsamp_fast.report.figures import select, task_rewards
from tempsamp_fast.run.log import RunLog
from tempsamp_fast.sample import Sample

PROMPT = SimpleNamespace(sample=Sample("a", Path("a.mp4"), "a query", 4.0, ((1.0, 3.0),)), mode="answer")


def group(*rewards):
    """A group with these rewards, the last one off-policy; advantages are 0, 1, ..."""
    ids = torch.tensor([1])
    completions = [Completion(ids, "", i == len(rewards) - 1, rewards={"tiou": r}) for i, r in enumerate(rewards)]
    return RolloutGroup(PROMPT, completions, torch.arange(float(len(rewards))))


def test_groups_are_recorded_and_dropped_from_the_step_of_a_resumption(tmp_path):
    config = parse_args([])
    unrewarded = RolloutGroup(PROMPT, [Completion(torch.tensor([1]), "")], torch.ones(1))
    with RunLog(tmp_path, config, total_steps=3, first_step=0, active=True) as log:
        for step in range(3):
            log.log_groups(step, "tempsamp/answer", [group(0.25, 0.5, 1.0), unrewarded])
    with RunLog(tmp_path, config, total_steps=3, first_step=2, active=True) as log:
        log.log_groups(2, "tempsamp/answer", [group(0.75, 1.0)])
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [(row["step"], task_rewards(row)) for row in rows] == [(0, [0.25, 0.5]), (1, [0.25, 0.5]), (2, [0.75])]
    assert [select(row, row["advantages"], is_off_policy=True) for row in rows] == [[2.0], [2.0], [1.0]]


def test_rows_are_in_their_files_before_the_record_is_closed(tmp_path):
    """A run that is killed has lost none of the steps that it took."""
    with RunLog(tmp_path, parse_args([]), total_steps=1, first_step=0, active=True) as log:
        log.log(0, "tempsamp/answer", {"loss": 1.0})
        log.log_groups(0, "tempsamp/answer", [group(0.25, 1.0)])
        written = [(tmp_path / name).read_text().count("\n") for name in ("metrics.jsonl", "groups.jsonl")]
    assert written == [1, 1]


def test_tensorboard_is_told_from_which_step_on_a_run_is_taken_again(tmp_path):
    for first_step in (0, 2):
        with RunLog(tmp_path, parse_args([]), total_steps=3, first_step=first_step, active=True) as log:
            log.log(2, "sft/answer", {"loss": 1.0})
    files = (tmp_path / "tensorboard").iterdir()
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    assert sorted(event.step for event in events if event.session_log.status == SessionLog.START) == [0, 2]

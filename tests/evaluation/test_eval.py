"""One command evaluates a checkpoint: what it prints and keeps, and that being interrupted changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.eval import main, require_same_settings
from tempsamp_fast.evaluation.answerer import Answerer
from tempsamp_fast.evaluation.scoring import score_rows
from tempsamp_fast.infer import infer
from tempsamp_fast.score import answers_file

LENGTH = ("--max_completion_length", "12", "--video_backend", "torchcodec", "--fps", "1")
Words = Callable[..., list[str]]


@pytest.fixture
def words(clips: Path, checkpoint: Path, tmp_path: Path) -> Words:
    """`words(output, ...)`: command line words; the embedded queries are in a file of a published name."""
    entries = json.loads((clips / "annotations/train.json").read_text())
    annotations = tmp_path / "charades_test.json"
    annotations.write_text(json.dumps(entries))

    def make(output: str, *more: str, videos: Path = clips / "videos") -> list[str]:
        folders = ["--model", str(checkpoint), "--videos", str(videos), "--output", str(tmp_path / output)]
        return [*folders, "--annotations", str(annotations), *LENGTH, *more]

    return make


def rows(folder: Path, mode: str = "answer") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{mode}.jsonl").read_text().splitlines()]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """`stop_after(n)`: the evaluation is interrupted before batch n; the list counts the queries of every batch."""
    original = Answerer.answer

    def stop(num_batches: int) -> list[int]:
        sizes: list[int] = []

        def answer(self: Answerer, prompts: Any) -> Any:
            if len(sizes) == num_batches:
                raise KeyboardInterrupt
            sizes.append(len(prompts))
            return original(self, prompts)

        monkeypatch.setattr(Answerer, "answer", answer)
        return sizes

    return stop


def test_answers_are_those_of_inference_and_scores_those_of_the_answers(
    words: Words, tmp_path: Path, clips: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("out", "--untagged")) == 0
    printed = capsys.readouterr().out
    found = rows(tmp_path / "out")
    samples = load_annotations(clips / "annotations/train.json", clips / "videos")
    assert [row["sample_id"] for row in found] == [sample.sample_id for sample in samples]
    (scores,) = json.loads((tmp_path / "out/scores.json").read_text())["rows"]
    assert scores == {
        "mode": "answer",
        "protocol": "own",
        **score_rows(samples, found, "grounding", require_tags=False),
        "outside_video": 0,
    }
    assert f"ours                          answer  {100 * scores['miou']:>9.1f}" in printed
    assert "TempSamp-R1                   think        62.1     83.6     74.1     52.9" in printed
    assert "50 videos" not in printed
    assert not list((tmp_path / "out").glob("answer.*.jsonl"))


@pytest.mark.parametrize(("name", "heading"), [("timelens2", "R1@0.7"), ("omtg", "EtF1")])
def test_a_published_protocol_is_followed_end_to_end(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, heading: str
) -> None:
    assert main(words("out", "--protocol", name, "--max_samples", "2")) == 0
    printed = capsys.readouterr().out
    assert heading in printed and f"protocol {name}: " in printed
    assert json.loads((tmp_path / "out/settings.json").read_text())["protocol"] == name
    assert all("spans" in row for row in rows(tmp_path / "out"))
    assert main(words("out", "--max_samples", "2")) == 2
    assert f"protocol '{name}', now 'own'" in capsys.readouterr().err


def test_frames_are_taken_as_in_training_unless_told_otherwise(words: Words, checkpoint: Path, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "trained")
    (model / "video.json").write_text(json.dumps({"fps": 0.5, "max_pixels": 3136, "min_pixels": 3136}))
    *plain, _, _ = words("out")
    assert main([*plain, "--model", str(model), "--max_samples", "1"]) == 0
    (row,) = rows(tmp_path / "out")
    assert row["text"] == infer(str(model), Path(row["video"]), row["query"], max_completion_length=12)["text"]
    assert json.loads((tmp_path / "out/settings.json").read_text())["fps"] == 0.5
    assert main([*words("other"), "--model", str(model), "--max_samples", "1"]) == 0
    assert json.loads((tmp_path / "other/settings.json").read_text())["fps"] == 1.0


def test_an_interrupted_evaluation_continues_where_it_was(words: Words, tmp_path: Path, stop_after) -> None:
    assert main(words("whole", "--batch_size", "3")) == 0
    stop_after(2)
    assert main(words("cut", "--batch_size", "3")) == 128 + signal.SIGINT
    (part,) = (tmp_path / "cut").glob("answer.*.jsonl")
    part.write_bytes(part.read_bytes()[:-20])  # killed while writing the sixth answer
    sizes = stop_after(10**9)
    assert main(words("cut", "--batch_size", "3")) == 0
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert sum(sizes) == len(rows(tmp_path / "whole")) - 5
    sizes.clear()
    assert main(words("cut")) == 0 and sizes == []


def test_other_settings_or_another_data_set_do_not_continue_it(
    words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words("out", "--max_samples", "1")) == 0
    capsys.readouterr()
    assert main(words("out", "--temperature", "0.5", "--seed", "3")) == 2
    assert "began with temperature 0.0, now 0.5; seed 0, now 3; choose another folder" in capsys.readouterr().err
    path = tmp_path / "charades_test.json"
    entries = json.loads(path.read_text())
    for entry in entries.values():
        entry["sentences"] = ["something else"] * len(entry["sentences"])
    path.write_text(json.dumps(entries))
    assert main(words("out")) == 2
    assert "answer.jsonl: line 1 answers another query of the id" in capsys.readouterr().err


def test_a_folder_without_answers_takes_new_settings(tmp_path: Path) -> None:
    require_same_settings(tmp_path, {"model": "a folder that holds none"})
    require_same_settings(tmp_path, {"model": "another"})
    (tmp_path / "answer.0.jsonl").touch()
    with pytest.raises(ValueError, match="began with model 'another', now 'a third'"):
        require_same_settings(tmp_path, {"model": "a third"})


def test_sampled_answers_depend_on_their_seed_alone(words: Words, tmp_path: Path) -> None:
    sampled = ("--temperature", "1.0", "--max_samples", "4")
    for output, more in (("a", ("--batch_size", "1")), ("b", ()), ("c", ("--seed", "1"))):
        assert main(words(output, *sampled, *more)) == 0
    texts = [[row["text"] for row in rows(tmp_path / output)] for output in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_both_modes_and_their_upper_bound(words: Words, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words("out", "--mode", "answer+think", "--mixed_cot", "--max_samples", "3")) == 0
    printed = capsys.readouterr().out
    assert "chosen by looking at the truth; an upper bound, no result" in printed
    assert "ours: the first 3 of 3720 queries only" in printed
    by_mode = [row["mode"] for row in json.loads((tmp_path / "out/scores.json").read_text())["rows"]]
    assert by_mode == ["answer", "think", "mixed"]


def test_scores_of_a_mode_that_was_asked_before_stay(words: Words, tmp_path: Path) -> None:
    read = lambda: {row["mode"]: row for row in json.loads((tmp_path / "out/scores.json").read_text())["rows"]}
    assert main(words("out", "--mode", "think", "--max_samples", "3")) == 0
    before = read()
    assert main(words("out", "--mode", "answer", "--max_samples", "3")) == 0
    assert read().keys() == {"answer", "think"} and read()["think"] == before["think"]
    assert main(words("out", "--mode", "answer", "--max_samples", "3", "--untagged")) == 0
    assert read().keys() == {"answer"}
    assert main(words("out", "--mode", "think", "--max_samples", "2", "--untagged")) == 0
    assert read().keys() == {"think"}


def test_queries_of_bad_videos_count_as_wrong_and_are_asked_again(
    words: Words, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in (clips / "videos").iterdir():
        (videos / file.name).symlink_to(file)
    broken = next(videos.glob(f"{next(iter(json.loads((tmp_path / 'charades_test.json').read_text())))}.*"))
    good = broken.readlink()
    broken.unlink()
    broken.write_text("not a video")
    assert main(words("out", videos=videos)) == 2
    assert broken.name in capsys.readouterr().err
    assert main(words("out", "--skip_bad_videos", videos=videos)) == 0
    lost = [row for row in rows(tmp_path / "out") if "skipped" in row]
    assert lost and {Path(row["video"]).name for row in lost} == {broken.name}
    assert f"skipped for a bad video and counted as not read: {len(lost)}" in capsys.readouterr().out
    broken.unlink()
    broken.symlink_to(good)
    assert main(words("out", videos=videos)) == 0
    again = [row for row in rows(tmp_path / "out") if Path(row["video"]).name == broken.name]
    assert again and all(row["text"] and "skipped" not in row for row in again)


@pytest.fixture
def highlights(words: Words, clips: Path, tmp_path: Path) -> Path:
    """Two queries of several windows each, as QVHighlights writes them."""
    videos = sorted((clips / "videos").iterdir())[:2]
    lines = [
        {"qid": index, "query": "a shape", "vid": video.stem, "duration": 8, "relevant_windows": [[0, 2], [4, 6]]}
        | {"relevant_clip_ids": [0, 2], "saliency_scores": [[4, 4, 4], [2, 3, 4]]}
        for index, video in enumerate(videos)
    ]
    path = tmp_path / "qvhighlights_val.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("task", "heading", "published"), [("highlight", "HL mAP", "57.6"), ("multi_grounding", "MR mAP", None)]
)
def test_highlights_and_several_spans_have_their_own_metrics(
    words: Words, highlights: Path, capsys: pytest.CaptureFixture[str], task: str, heading: str, published: str | None
) -> None:
    assert main([*words("out", "--task", task), "--annotations", str(highlights)]) == 0
    printed = capsys.readouterr().out
    assert heading in printed
    assert ("published" in printed) == (published is not None)
    assert published is None or published in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mode", "loud"), "--mode loud: choose answer, think or answer+think"),
        (("--mixed_cot",), "--mixed_cot needs --mode answer+think"),
        (("--task", "highlight"), "charades_test.json has no clip scores"),
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--batch_size", "0"), "--batch_size 0"),
        (("--annotations", "charades"), "no data set of charades-train"),
        (("--model", "/nowhere"), "model='/nowhere'"),
    ],
)
def test_bad_input_ends_with_one_line(
    words: Words, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(words("out", *more)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_answer_as_one(words: Words, tmp_path: Path) -> None:
    assert main(words("one", "--mode", "answer+think")) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launcher, "-m", "tempsamp_fast.eval", *words("two", "--mode", "answer+think")]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ours") == 2
    for mode in ("answer", "think"):
        assert rows(tmp_path / "two", mode) == rows(tmp_path / "one", mode)


@pytest.mark.parametrize("name", ["answer.jsonl", "eval/1_sft_think.jsonl"])
def test_score_finds_the_answers_that_eval_or_a_run_left(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "answers"
    (folder / name).parent.mkdir(parents=True)
    with pytest.raises(ValueError, match="has no answers"):
        answers_file(str(folder))
    (folder / name).write_text("{}\n")
    (folder / "scores.json").write_text("{}")
    assert answers_file(str(folder)) == folder / name

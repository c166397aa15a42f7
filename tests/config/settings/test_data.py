"""Settings of the data off their defaults: what is read, which frames are taken, what is kept of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.batch import Completion, VideoPatches
from tempsamp_fast.config import DataConfig
from tempsamp_fast.data import loader
from tempsamp_fast.data.annotations import load_annotations
from tempsamp_fast.data.catalogue import load_training_data
from tempsamp_fast.data.draws import drawn_as_timelens, drawn_as_timelens2
from tempsamp_fast.data.order import TrainingOrder
from tempsamp_fast.data.prompt_file import saved_templates
from tempsamp_fast.run.checkpoint import VIDEO_FIELDS, save_model
from tempsamp_fast.run.results import Results
from tempsamp_fast.run.run import Run
from tempsamp_fast.run.schedule import plan
from tempsamp_fast.video import Sampling, load_videos

SHORT = ("--phases", "sft:1")
FREE = ("--min_pixels", "784", "--max_pixels", "100000")
"""Frames of 48 x 64 keep about their size: 4 x 4 patches."""


def rows(**videos: tuple[float, float, float]) -> str:
    """TimeLens lines, one a video: duration, length of the true span, difficulty; `a` has two queries."""
    made = [
        {
            "problem": f"query {number}",
            "answer": f"<answer> 0.0 to {length} </answer>",
            "videos": [f"{name}.mp4"],
            "difficulty": difficulty,
            "duration": duration,
        }
        for name, (duration, length, difficulty) in videos.items()
        for number in range(2 if name == "a" else 1)
    ]
    return "\n".join(map(json.dumps, made))


@pytest.fixture
def in_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two training files, a held-out one, and two folders for videos."""
    monkeypatch.chdir(tmp_path)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "train.jsonl").write_text(rows(a=(10, 2, 0.1), b=(20, 4, 0.5), c=(30, 6, 0.9)))
    (tmp_path / "other.jsonl").write_text(rows(d=(10, 2, 0.1)))
    (tmp_path / "test.jsonl").write_text(rows(e=(10, 2, 0.1), f=(20, 2, 0.1)))


LOADED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "a a b c", "here/e here/f"),
    ({"annotations": "other.jsonl"}, "d", "here/e here/f"),
    ({"eval_annotations": "other.jsonl"}, "a a b c", "here/d"),
    ({"eval_annotations": None}, "a a b c", ""),
    ({"videos": "there"}, "a a b c", "there/e there/f"),
    ({"eval_videos": "there"}, "a a b c", "there/e there/f"),
    ({"few_shot_videos": 1}, "a a", "here/e here/f"),
    ({"few_shot_videos": 1, "few_shot_seed": 2}, "b", "here/e here/f"),
    ({"few_shot_videos": 1, "few_shot_queries": "one"}, "a", "here/e here/f"),
    ({"few_shot_videos": 3}, "a a b c", "here/e here/f"),
    ({"duration_range": "20:"}, "b c", "here/e here/f"),
    ({"window_range": ":4"}, "a a b", "here/e here/f"),
    ({"difficulty_range": "0.5:0.9"}, "b c", "here/e here/f"),
    ({"max_eval_samples": 1}, "a a b c", "here/e"),
    ({"max_eval_samples": 0}, "a a b c", ""),
]


@pytest.mark.parametrize(("changed", "train", "held_out"), LOADED, ids=str)
@pytest.mark.usefixtures("in_data_folder")
def test_what_is_learnt_from_and_tested_on(changed: dict[str, Any], train: str, held_out: str) -> None:
    """Ranges include both ends and act on training alone; each row differs from the first by what it names."""
    settings = {"annotations": "train.jsonl", "eval_annotations": "test.jsonl", "videos": "here"} | changed
    learnt, tested = load_training_data(DataConfig(**settings))
    assert [sample.video_id for sample in learnt] == train.split()
    assert {str(sample.video.parent) for sample in learnt} == {settings["videos"]}
    assert [str(sample.video.with_suffix("")) for sample in tested] == held_out.split()


def test_training_samples_are_drawn_as_asked(in_data_folder: None) -> None:
    hard, easy = ([{"rollouts": [iou] * 2} for _ in range(8)] for iou in (0.05, 1.0))
    flat = [
        {"video_path": f"{index}.mp4", "duration": 10, "query": "q", "span": [0, 2]} | more
        for index, more in enumerate([*hard, *easy])
    ]
    Path("flat.jsonl").write_text("\n".join(map(json.dumps, flat)))

    def drawn(**settings: Any) -> list[str]:
        data = DataConfig(**({"annotations": "flat.jsonl", "videos": "here"} | settings))
        return [sample.video_id for sample in load_training_data(data)[0]]

    for rule in ("timelens", "timelens2"):
        of_seed_0, of_seed_1 = (drawn(draw=rule, draw_samples=4, draw_seed=seed) for seed in (0, 1))
        assert len(of_seed_0) == 4 and of_seed_0 != of_seed_1
    samples = load_annotations("flat.jsonl", "here")
    for rule, function in (("timelens", drawn_as_timelens), ("timelens2", drawn_as_timelens2)):
        assert drawn(draw=rule, draw_samples=12) == [sample.video_id for sample in function(samples, 12, 0)]
    assert {*drawn(draw="timelens2", draw_samples=4)} <= {*map(str, range(8))}
    Path("like.jsonl").write_text(rows(x=(10, 2, 0.1)))
    release = {"draw": "release", "draw_samples": 2, "draw_like": "like.jsonl", "annotations": "train.jsonl"}
    assert set(drawn(**release)) <= {"a", "b", "c"} and len(drawn(**release)) == 2
    for wrong in ({"draw": "timelens"}, {"draw_samples": 3}, {"draw": "release", "draw_samples": 1}):
        with pytest.raises(ValueError, match="draw_"):
            drawn(**wrong)


def test_the_embedded_data_set_has_as_many_videos_as_asked_for_where_asked_for(trainer, tmp_path: Path) -> None:
    words = ("--annotations", "synthetic", "--synthetic_videos", "2,0,1", "--synthetic_dir", str(tmp_path / "made"))
    flags = trainer.flags(tmp_path / "run", *SHORT, *words, "--max_eval_samples", "9")
    place = flags.index("--videos")
    run = Run(parse_args(flags[:place] + flags[place + 2 :]))
    counts = [len({sample.video for sample in samples}) for samples in (run.train_samples, run.eval_samples)]
    assert counts == [2, 1]
    assert all(tmp_path / "made" in sample.video.parents for sample in (*run.train_samples, *run.eval_samples))


def test_the_task_is_asked_answered_and_rewarded(stepper: Callable) -> None:
    run = stepper("--phases", "sft:1,grpo:1", "--task", "multi_grounding").run
    first, second = plan(run.phases)
    trained, evaluated = run.prompts(first)[0], run.loader.prompts(run.train_samples[:1], ["answer"])[0]
    for prompt in (trained, evaluated):
        assert "Find every time span" in run.chat.tokenizer.decode(prompt.input_ids)
    two_spans = replace(trained, sample=replace(trained.sample, windows=((0.0, 1.0), (2.0, 3.0))))
    (group,) = run.answer(first, [two_spans])
    assert group.completions[0].text == "<answer> 0.00 to 1.00, 2.00 to 3.00 </answer>"
    (group,) = run.answer(second, [two_spans])
    assert [list(each.rewards) for each in group.completions] == [["multi_tiou"]] * 3


def test_the_form_asked_for_is_asked_answered_rewarded_and_scored(stepper: Callable) -> None:
    run = stepper("--phases", "sft:1,grpo:1", "--answer_form", "json").run
    first, second = plan(run.phases)
    prompt = run.prompts(first)[0]
    assert "JSON list" in run.chat.tokenizer.decode(prompt.input_ids)
    two_spans = replace(prompt, sample=replace(prompt.sample, windows=((0.0, 1.0), (2.0, 3.0))))
    (group,) = run.answer(first, [two_spans])
    text = group.completions[0].text
    assert text == "<answer>[[0.00, 1.00], [2.00, 3.00]]</answer>"
    run.sample = lambda prompts, counts, *_, **__: [[Completion(torch.tensor([1]), text)] * counts[0]]
    (group,) = run.answer(second, [two_spans])
    assert [each.rewards for each in group.completions] == [{"tiou": 1.0}] * 3
    run.eval_samples = [two_spans.sample]
    with run.log() as log:
        results = Results(run)
        run.greedy = lambda prompts, counts: [[Completion(torch.tensor([1]), text)] for _ in prompts]
        results.evaluate("start", 0, log)
    assert (results.rows[0]["miou"], results.rows[0]["protocol"]) == (1.0, "own")
    assert "answer_form" in VIDEO_FIELDS


def whole(run: Run) -> VideoPatches:
    (prompt,) = run.loader.prompts(run.train_samples[:1], ["answer"])
    return prompt.video


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--fps", "2"), Sampling(fps=2.0)),
        (("--min_frames", "20"), Sampling(fps=1.0, min_frames=20)),
        (("--max_frames", "4"), Sampling(fps=1.0, max_frames=4)),
        (("--sampling", "hf_qwen3"), Sampling("hf_qwen3", fps=1.0)),
    ],
)
def test_frames_are_taken_by_the_rule_asked_for(stepper: Callable, words: tuple[str, str], rule: Sampling) -> None:
    run = stepper(*SHORT, *words).run
    file = run.train_samples[0].video
    expected, by_default = (
        load_videos([(file, each)], run.loader.geometry).timestamps_s[0].tolist() for each in (rule, Sampling(fps=1.0))
    )
    video = whole(run)
    assert video.timestamps_s.tolist() == expected != by_default
    assert video.grid_thw[0] == len(expected)
    if rule.fps == 2:
        assert video.second_per_grid == 1.0


@pytest.mark.parametrize(
    ("words", "height_width"),
    [
        ((), (4, 4)),
        (("--min_pixels", "8000"), (6, 8)),
        (("--max_pixels", "1000"), (2, 2)),
        (("--total_pixels", "4000"), (2, 2)),
    ],
)
def test_frames_are_as_large_as_asked_for(
    stepper: Callable, words: tuple[str, ...], height_width: tuple[int, int]
) -> None:
    """Patches of 14 pixels along height and width."""
    assert sorted(whole(stepper(*SHORT, *FREE, *words).run).grid_thw[1:]) == sorted(height_width)


@pytest.mark.parametrize("backend", ["native", "torchcodec"])
def test_the_backend_asked_for_decodes(stepper: Callable, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("tempsamp_fast._video", reason="the extension tempsamp_fast._video is not built")
    used: list[str] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        batch = load_videos(*arguments, **options)
        used.extend(result.backend for result in batch.results)
        return batch

    monkeypatch.setattr(loader, "load_videos", noting)
    whole(stepper(*SHORT, "--video_backend", backend).run)
    assert [name.split()[0] for name in used] == [backend]


def test_the_share_asked_for_is_cropped(stepper: Callable) -> None:
    """Within three standard errors, the same positions whatever else is asked for."""
    for share in (0.25, 0.75):
        run = stepper(*SHORT, "--random_crop", str(share)).run
        prompts = run.loader.training_prompts(TrainingOrder(run.train_samples, seed=0), range(40), ["answer"] * 40)
        cropped = sum(not prompt.video.is_whole for prompt in prompts) / 40
        assert abs(cropped - share) < 3 * (0.25 * 0.75 / 40) ** 0.5


def test_as_many_steps_are_made_ahead_as_asked_for(stepper: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for depth in (1, 3):
        made = []
        monkeypatch.setattr(Run, "prompts", lambda _, at, made=made: made.append(at.step) or [])
        with stepper("--phases", "sft:9", "--prefetch_steps", str(depth)).run.steps() as steps:
            for future in list(steps._ahead):
                future.result()
            assert made == list(range(depth))


def test_as_many_videos_stay_in_memory_as_fit(stepper: Callable, decoded: list[Path]) -> None:
    run = stepper(*SHORT).run
    samples = list({sample.video: sample for sample in run.train_samples}.values())[:2]
    run.loader.prompts(samples, ["answer"] * 2)
    num_bytes = sum(video.nbytes for video in run.loader._videos.values())
    for gib, num_decoded in ((num_bytes / 2**30, 2), ((num_bytes - 1) / 2**30, 3)):
        run = stepper(*SHORT, "--video_cache_gib", str(gib)).run
        decoded.clear()
        for _ in range(2):
            run.loader.prompts(samples[::-1], ["answer"] * 2)
        assert len(decoded) == num_decoded


def test_as_many_bad_videos_an_epoch_are_replaced_as_allowed(stepper: Callable) -> None:
    """Of three videos two are bad in each of two epochs; where one is allowed the second ends the run."""
    for allowed in (2, 1):
        run = stepper(*SHORT, "--on_bad_video", "skip", "--max_bad_videos", str(allowed)).run
        samples = list({sample.video: sample for sample in run.train_samples}.values())[:3]
        run.loader.skipped = dict.fromkeys((sample.video for sample in samples[:2]), "broken")
        if allowed == 2:
            prompts = run.loader.training_prompts(TrainingOrder(samples, seed=0), range(6), ["answer"] * 6)
            assert {prompt.sample.sample_id for prompt in prompts} == {samples[2].sample_id}
            assert [sum(each.is_replacement for each in prompts[at : at + 3]) for at in (0, 3)] == [2, 2]
        else:
            with pytest.raises(ValueError, match=r"epoch 0 has 2 bad videos \(max_bad_videos=1\)"):
                run.loader.training_prompts(TrainingOrder(samples, seed=0), range(3), ["answer"] * 3)


@pytest.mark.usefixtures("in_data_folder")
def test_files_are_read_as_the_format_asked_for() -> None:
    settings = {"annotations": "train.jsonl", "eval_annotations": "test.jsonl", "videos": "here"}
    for name in ("auto", "timelens"):
        assert len(load_training_data(DataConfig(**settings, format=name))[0]) == 4
    with pytest.raises(ValueError, match=r"train\.jsonl: line 1: no field 'video'"):
        load_training_data(DataConfig(**settings, format="plain"))
    with pytest.raises(ValueError, match=r"test\.jsonl: line 1: no field 'videos'"):
        Path("test.jsonl").write_text(json.dumps({"video": "a", "query": "q", "start": 0, "end": 1, "duration": 2}))
        load_training_data(DataConfig(**settings, format="timelens"))


def test_questions_are_those_of_the_prompt_file(stepper: Callable, tmp_path: Path) -> None:
    """In training and evaluation; a checkpoint has a copy of them, by which it is asked later."""
    file = tmp_path / "mine.yaml"
    file.write_text('answer: "say when {query} {answer_form}"\n')
    run = stepper(*SHORT, "--prompt_file", str(file)).run
    (first,) = plan(run.phases)
    for prompt in (run.prompts(first)[0], run.loader.prompts(run.train_samples[:1], ["answer"])[0]):
        text = run.chat.tokenizer.decode(prompt.input_ids)
        assert f"say when {prompt.sample.query.lower().rstrip('.')} Give its start" in text
    save_model(tmp_path / "model", run.policy, run.chat, run.config.data)
    assert saved_templates(str(tmp_path / "model")) == {"answer": "say when {query} {answer_form}"}
    with pytest.raises(ValueError, match=r"mine\.yaml: no template for the mode think"):
        stepper("--phases", "sft/think:1", "--prompt_file", str(file))

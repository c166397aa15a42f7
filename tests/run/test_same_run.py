"""What a resumed run refuses: whatever changes its samples, its frames, its model, or which prompts come next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import Config
from tempsamp_fast.run.resume import check_same_run, facts_of, samples_digest
from tempsamp_fast.sample import Sample

SAMPLE = Sample("v/0", Path("v.mp4"), "a query", 10.0, ((1.0, 2.0), (3.0, 4.0)), {1: (4, 3, 2)}, difficulty=0.5)
OTHER = replace(SAMPLE, sample_id="w/0", video=Path("w.mp4"))
SAMPLES = [SAMPLE, OTHER]

OTHERWISE: dict[str, Any] = {
    "few_shot_videos": 2, "few_shot_seed": 5, "few_shot_queries": "one", "duration_range": "1:2", "window_range": "1:2",
    "difficulty_range": "1:2", "synthetic_videos": "1,1,1", "task": "highlight", "sampling": "hf_qwen3", "fps": 3.0,
    "min_frames": 6, "max_frames": 10, "min_pixels": 1000, "max_pixels": 2000, "total_pixels": 3000, "random_crop": 0.5,
    "cache_features": True, "tiny_family": "qwen3_vl", "dtype": "bfloat16", "freeze_vision": True, "lora_rank": 3,
    "lora_alpha": 3.0, "lora_targets": "q_proj", "attention_core": "split", "seed": 9, "prompts_per_device": 3,
    "sft_prompts_per_device": 3, "queries_per_video": 2, "draw": "timelens", "draw_samples": 9, "draw_seed": 3,
    "draw_like": "other", "answer_form": "timelens",
}  # fmt: skip
"""The settings that are fixed, each with another value."""


@cache
def started() -> Config:
    return parse_args(["--phases", "sft:4,grpo:4", "--gradient_accumulation_steps", "2"])


def settings(**changed: Any) -> Config:
    """Those of a new run, with some of another value, whatever their section."""
    config = deepcopy(started())
    for section in dataclasses.fields(config):
        for name, value in changed.items():
            if hasattr(getattr(config, section.name), name):
                setattr(getattr(config, section.name), name, value)
    return config


def resume(config: Config, samples: list[Sample] = SAMPLES, world_size: int = 1, step: int = 3, **then: Any) -> None:
    """Go on, after `step` steps, with a run that was started with other settings, samples and ranks."""
    state = {"step": step, "zero_stage": 0} | facts_of(settings(), SAMPLES, 1) | then
    check_same_run(Path("run"), state, config, samples, world_size)


def test_the_same_settings_and_samples_go_on() -> None:
    resume(settings())


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_fixed_setting_of_another_value_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot go on with other settings: {name} was "):
        resume(settings(**{name: OTHERWISE[name]}))


STAGE_AND_STEPS = ("phases", "gradient_accumulation_steps", "zero_stage", "offload", "deepspeed_config", "prompt_file")
"""Settings whose changes are looked at together with others; see the tests below."""


def test_every_other_setting_may_change() -> None:
    def other(value: Any) -> Any:
        if isinstance(value, bool):
            return not value
        return value + 1 if isinstance(value, (int, float)) else "other"

    for section in dataclasses.fields(settings()):
        for name, value in vars(getattr(settings(), section.name)).items():
            if name not in (*OTHERWISE, *STAGE_AND_STEPS):
                resume(settings(**{name: other(value)}))


CHANGED_SAMPLES: dict[str, Callable[[], list[Sample]]] = {
    "a window": lambda: [SAMPLE, replace(OTHER, windows=((1.0, 2.0), (3.0, 4.5)))],
    "the order of windows": lambda: [SAMPLE, replace(OTHER, windows=OTHER.windows[::-1])],
    "a query": lambda: [SAMPLE, replace(OTHER, query="another query")],
    "a duration": lambda: [SAMPLE, replace(OTHER, duration_s=11.0)],
    "an id": lambda: [SAMPLE, replace(OTHER, sample_id="w/1")],
    "a score of a clip": lambda: [SAMPLE, replace(OTHER, clip_scores={1: (4, 3, 1)})],
    "the clip of a score": lambda: [SAMPLE, replace(OTHER, clip_scores={2: (4, 3, 2)})],
    "their order": lambda: SAMPLES[::-1],
    "their number": lambda: SAMPLES[:1],
}


@pytest.mark.parametrize("what", CHANGED_SAMPLES)
def test_samples_that_ask_or_hold_true_something_else_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match="samples was 2 samples"):
        resume(settings(), CHANGED_SAMPLES[what]())


def test_samples_may_lie_elsewhere() -> None:
    moved = [replace(each, video=Path("elsewhere") / each.video, difficulty=None) for each in SAMPLES]
    assert samples_digest(moved) == samples_digest(SAMPLES)
    resume(settings(), moved)


def test_a_step_keeps_its_number_of_rows() -> None:
    """Fewer on more ranks, as many together."""
    resume(settings(gradient_accumulation_steps=1), world_size=2)
    for accumulation, ranks in ((2, 2), (1, 1), (4, 1)):
        with pytest.raises(ValueError, match=f"was 2 on 1 ranks, is {accumulation} on {ranks}: a step takes 2 rows"):
            resume(settings(gradient_accumulation_steps=accumulation), world_size=ranks)


@pytest.mark.parametrize("phases", ["sft:4,grpo:9", "sft:4,tempsamp:4", "sft:4@1e-3,grpo:4", "sft:3,grpo:4", "sft:9"])
def test_steps_to_come_may_change(phases: str) -> None:
    resume(settings(phases=phases))


@pytest.mark.parametrize("phases", ["sft:2,grpo:4", "grpo:4", "sft/think:4,grpo:4", "sft:1,sft:9", "sft:2"])
def test_steps_done_may_not_change(phases: str) -> None:
    with pytest.raises(ValueError, match="the 3 steps done are not in it"):
        resume(settings(phases=phases))


def test_the_stage_may_not_change() -> None:
    resume(settings(zero_stage="1"), zero_stage=1)
    with pytest.raises(ValueError, match="zero_stage was 0, is 2"):
        resume(settings(zero_stage="2"))


def test_a_prompt_file_may_move_and_not_ask_otherwise(tmp_path: Path) -> None:
    """Nor be edited in place, nor left out."""
    for name, words in (("one", "when {query}"), ("moved", "when {query}"), ("other", "where {query}")):
        (tmp_path / name).write_text(f"answer: '{words}'\n")
    named = lambda name: settings(prompt_file=str(tmp_path / name))
    then = facts_of(named("one"), SAMPLES, 1)["own_files"]
    for same in ("one", "moved"):
        resume(named(same), own_files=then)
    (tmp_path / "one").write_text("answer: 'why {query}'\n")
    for changed in (named("one"), named("other"), settings()):
        with pytest.raises(ValueError, match="prompt_file does not ask as it did"):
            resume(changed, own_files=then)

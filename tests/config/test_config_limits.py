"""Limits of settings: what lies on the edge is taken where the rule includes it, and refused where it does not."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from tempsamp_fast.arguments import SECTIONS
from tempsamp_fast.config import AlgorithmConfig, DataConfig, ModelConfig, RolloutConfig, TrainConfig, parse_range

JUST_ABOVE_0 = 1e-12
NEXT_BELOW_0 = -1e-12
BELOW_1, ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)

LIMITS: list[tuple[type, str, list[Any], list[Any]]] = [
    (DataConfig, "fps", [JUST_ABOVE_0], [0, math.inf, -1.0]),
    (DataConfig, "min_frames", [2, 768], [1, 769]),
    (DataConfig, "max_frames", [4], [3]),
    (DataConfig, "random_crop", [0, 1], [NEXT_BELOW_0, ABOVE_1]),
    (DataConfig, "max_bad_videos", [None, 0], [-1]),
    (DataConfig, "prefetch_steps", [1], [0]),
    (DataConfig, "video_cache_gib", [0], [NEXT_BELOW_0]),
    (DataConfig, "min_pixels", [None, 1], [0]),
    (DataConfig, "max_pixels", [None, 1], [0]),
    (DataConfig, "total_pixels", [None, 1], [0]),
    (DataConfig, "max_eval_samples", [None, 0], [-1]),
    (DataConfig, "few_shot_videos", [None, 1], [0]),
    (DataConfig, "duration_range", [None, "5:5", ":", "5:", ":5", "-1:1"], ["5", "6:5", "a:b", "nan:nan"]),
    (DataConfig, "window_range", [None, "5:5"], ["5", "6:5"]),
    (DataConfig, "difficulty_range", [None, "0.5:0.5"], ["0.5", "0.6:0.5"]),
    (ModelConfig, "checkpoint_every", [1], [0]),
    (ModelConfig, "lora_rank", [0], [-1]),
    (ModelConfig, "lora_alpha", [None, JUST_ABOVE_0], [0]),
    (RolloutConfig, "num_generations", [2], [1]),
    (RolloutConfig, "temperature", [JUST_ABOVE_0], [0]),
    (RolloutConfig, "top_p", [JUST_ABOVE_0, 1], [0, ABOVE_1]),
    (RolloutConfig, "top_k", [0], [-1]),
    (RolloutConfig, "max_completion_length", [1], [0]),
    (RolloutConfig, "vllm_memory", [JUST_ABOVE_0, BELOW_1], [0, 1]),
    (RolloutConfig, "max_logp_gap", [0], [NEXT_BELOW_0]),
    (AlgorithmConfig, "tau", [JUST_ABOVE_0, 1], [0, ABOVE_1]),
    (AlgorithmConfig, "alpha_1", [JUST_ABOVE_0], [0]),
    (AlgorithmConfig, "alpha_2", [JUST_ABOVE_0], [0]),
    (AlgorithmConfig, "lambda_off", [JUST_ABOVE_0], [0]),
    (AlgorithmConfig, "downscale", [0, 1.0], [NEXT_BELOW_0, ABOVE_1]),
    (AlgorithmConfig, "format_weight", [0.0], [NEXT_BELOW_0]),
    (AlgorithmConfig, "beta", [0], [NEXT_BELOW_0]),
    (AlgorithmConfig, "epsilon_low", [0, BELOW_1], [NEXT_BELOW_0, 1]),
    (AlgorithmConfig, "epsilon_high", [0, 1], [NEXT_BELOW_0]),
    (AlgorithmConfig, "delta", [None, math.nextafter(1.2, 2)], [1.2, 1]),
    (AlgorithmConfig, "updates_per_batch", [1], [0]),
    (AlgorithmConfig, "dual_clip", [None, ABOVE_1], [1, 0.5]),
    (AlgorithmConfig, "prune_ratio", [0, BELOW_1], [NEXT_BELOW_0, 1]),
    (AlgorithmConfig, "soft_overlong", [None, 1], [0]),
    (TrainConfig, "prompts_per_device", [1], [0]),
    (TrainConfig, "sft_prompts_per_device", [None, 1], [0]),
    (TrainConfig, "gradient_accumulation_steps", [1], [0]),
    (TrainConfig, "max_tokens_per_row", [1], [0]),
    (TrainConfig, "eval_batch_size", [1], [0]),
    (TrainConfig, "keep_checkpoints", [1], [0]),
    (TrainConfig, "learning_rate", [JUST_ABOVE_0], [0, math.inf]),
    (TrainConfig, "warmup_ratio", [0, 1], [NEXT_BELOW_0, ABOVE_1]),
    (TrainConfig, "weight_decay", [0], [NEXT_BELOW_0]),
    (TrainConfig, "adam_beta2", [0, BELOW_1], [NEXT_BELOW_0, 1]),
    (TrainConfig, "max_grad_norm", [0], [NEXT_BELOW_0]),
    (TrainConfig, "save_steps", [0], [-1]),
    (TrainConfig, "max_skipped_steps", [0], [-1]),
    (TrainConfig, "stall_timeout_s", [JUST_ABOVE_0], [0]),
    (TrainConfig, "stop_grace_s", [JUST_ABOVE_0], [0]),
    (TrainConfig, "seed", [2**40 - 1, 1 - 2**40], [2**40, -(2**40)]),
    (TrainConfig, "queries_per_video", [1], [0]),
    (TrainConfig, "sequence_parallel_size", [1], [0]),
    (TrainConfig, "eval_steps", [0], [-1]),
    (TrainConfig, "show_completions", [0], [-1]),
    (TrainConfig, "log_completions", [0], [-1]),
]


@pytest.mark.parametrize(("section", "name", "taken", "refused"), LIMITS, ids=[row[1] for row in LIMITS])
def test_the_edge_is_taken_and_what_lies_beyond_is_refused(
    section: type, name: str, taken: list[Any], refused: list[Any]
) -> None:
    for value in taken:
        assert getattr(section(**{name: value}), name) == value
    for value in refused:
        blamed = "min_frames" if name == "max_frames" else name
        with pytest.raises(ValueError, match=rf"^{blamed}="):
            section(**{name: value})


def test_no_number_is_no_value_of_a_bounded_setting() -> None:
    bounded = [(section, name) for section, name, taken, _ in LIMITS if isinstance(taken[-1], float)]
    assert len(bounded) > 10 and {section for section, _ in bounded} <= set(SECTIONS)
    for section, name in bounded:
        with pytest.raises(ValueError, match=f"^{name}="):
            section(**{name: math.nan})


@pytest.mark.parametrize("shaping", ["downscale", "anchor"])
def test_rules_that_always_divide_are_not_told_to_leave_it(shaping: Any) -> None:
    with pytest.raises(ValueError, match=f"^scale_rewards=False: must be true with shaping='{shaping}'"):
        AlgorithmConfig(shaping=shaping, scale_rewards=False)


NOTHING_OF = {int: 2.5, float: "0.5", bool: 1, str: 7}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_value_of_another_type_or_choice_is_refused(section: type) -> None:
    """Files are read into sections too: a choice that there is not must not wait until it is used."""
    for field in fields(section):
        type_ = get_type_hints(section)[field.name]
        kinds = [kind for kind in get_args(type_) or [type_] if kind is not type(None)]
        is_choice = get_origin(type_) is Literal
        wrong = ["surprise", None, ["x"]] if is_choice else [NOTHING_OF[kinds[0]], ["x"], {}]
        wrong += [math.inf, -math.inf, math.nan] if kinds[0] in (int, float) else [" "] if str in kinds else []
        for value in wrong:
            with pytest.raises(ValueError, match=f"^{field.name}[=:]"):
                section(**{field.name: value})


def test_an_open_end_of_a_range_is_infinite() -> None:
    assert parse_range("r", None) == parse_range("r", ":") == (-math.inf, math.inf)
    assert parse_range("r", "5:150") == (5, 150)
    assert (parse_range("r", "5:"), parse_range("r", ":60")) == ((5, math.inf), (-math.inf, 60))

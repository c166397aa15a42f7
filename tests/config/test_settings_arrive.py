"""The plan of what a changed setting changes: for every field of every section the law and the test that checks it."""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from tempsamp_fast.arguments import SECTIONS
from tempsamp_fast.config import AlgorithmConfig, DataConfig, ModelConfig, RolloutConfig, TrainConfig

TESTS = Path(__file__).parents[1]
DATA, MODEL, ROLLOUT, ALGORITHM, TRAIN = (
    f"config/settings/test_{name}.py::" for name in ("data", "model", "rollout", "algorithm", "train")
)
KEPT, LAWS = "data/test_kept_videos.py::", "learning/test_laws.py::"

LOADED = f"{DATA}test_what_is_learnt_from_and_tested_on"
RULE = f"{DATA}test_frames_are_taken_by_the_rule_asked_for"
SIZE = f"{DATA}test_frames_are_as_large_as_asked_for"
RECOMPUTED = f"{MODEL}test_the_layers_asked_for_run_again_in_the_first_update"
ADAPTERS = f"{MODEL}test_adapters_are_of_the_rank_scale_and_place_asked_for"
SAMPLER = f"{ROLLOUT}test_the_sampler_is_asked_as_settings_say"
VLLM = f"{ROLLOUT}test_vllm_samples_when_asked_for_within_the_memory_given"
REPLAY = f"{ROLLOUT}test_recorded_answers_are_replayed_in_place_of_sampled_ones"
ADVANTAGES = f"{ALGORITHM}test_advantages_follow_the_rule_and_numbers_asked_for"
LOSS = f"{ALGORITHM}test_every_number_of_the_loss_is_the_one_asked_for"
ROWS = f"{TRAIN}test_a_step_has_the_rows_asked_for"
RATE = f"{TRAIN}test_every_step_has_the_rate_of_its_schedule"
STATE = f"{TRAIN}test_optimizer_state_lies_where_asked_for"
BEST = "run/test_results.py::test_the_checkpoint_of_the_best_evaluation_stays_if_asked_for"
METRIC = f"{TRAIN}test_evaluations_come_as_often_as_asked_for_and_the_best"
KEPT_ANSWERS = f"{TRAIN}test_as_many_answers_are_kept_and_shown_as_asked_for"
PATIENCE = f"{TRAIN}test_patience_is_as_asked_for"

PLAN: dict[type, dict[str, tuple[str, str]]] = {
    DataConfig: {
        "annotations": ("another file, other training samples", LOADED),
        "eval_annotations": ("another file, other held-out samples; none without", LOADED),
        "format": ("what reads the file", f"{DATA}test_files_are_read_as_the_format_asked_for"),
        "prompt_file": ("the question, by its template", f"{DATA}test_questions_are_those_of_the_prompt_file"),
        "videos": ("the folder of all videos", LOADED),
        "eval_videos": ("the folder of the held-out videos alone", LOADED),
        "few_shot_videos": ("the samples of that many videos", LOADED),
        "few_shot_seed": ("other videos are drawn", LOADED),
        "few_shot_queries": ("one query of each drawn video", LOADED),
        "duration_range": ("videos within it alone", LOADED),
        "window_range": ("true spans within it alone", LOADED),
        "difficulty_range": ("difficulties within it alone", LOADED),
        "draw": ("whose rule draws", f"{DATA}test_training_samples_are_drawn_as_asked"),
        "draw_samples": ("so many are drawn", f"{DATA}test_training_samples_are_drawn_as_asked"),
        "draw_seed": ("others are drawn", f"{DATA}test_training_samples_are_drawn_as_asked"),
        "draw_like": ("strata of that benchmark", f"{DATA}test_training_samples_are_drawn_as_asked"),
        "synthetic_dir": ("videos are made there", f"{DATA}test_the_embedded_data_set_has_as_many_videos_as_asked_for"),
        "synthetic_videos": ("so many are", f"{DATA}test_the_embedded_data_set_has_as_many_videos_as_asked_for"),
        "task": (
            "question, true answer and reward of that task",
            f"{DATA}test_the_task_is_asked_answered_and_rewarded",
        ),
        "answer_form": ("question, true answer, reward and score of that form", f"{DATA}test_the_form_asked_for_is"),
        "max_eval_samples": ("the first held-out samples alone", LOADED),
        "on_bad_sample": (
            "a bad video ends the run or is replaced",
            "run/test_bad_input.py::test_skipped_videos_are_replaced_counted_and_listed",
        ),
        "max_bad_videos": (
            "one more of an epoch ends the run",
            f"{DATA}test_as_many_bad_videos_an_epoch_are_replaced_as_allowed",
        ),
        "video_backend": ("what decodes says its name", f"{DATA}test_the_backend_asked_for_decodes"),
        "video_device": (
            "the decoder is asked for that device",
            "data/test_loader.py::test_videos_are_decoded_on_the_device_of_the_setting",
        ),
        "sampling": ("frames of that rule", RULE),
        "fps": ("frames 1 / fps apart", RULE),
        "min_frames": ("a short video has so many", RULE),
        "max_frames": ("a long video has no more", RULE),
        "min_pixels": ("frames grow to it", SIZE),
        "max_pixels": ("frames shrink to it", SIZE),
        "total_pixels": ("frames share it", SIZE),
        "random_crop": ("that share of prompts is cropped", f"{DATA}test_the_share_asked_for_is_cropped"),
        "prefetch_steps": ("so many steps are ready", f"{DATA}test_as_many_steps_are_made_ahead_as_asked_for"),
        "patch_cache": (
            "a second run decodes nothing",
            "data/test_loader.py::test_the_disk_cache_gives_the_same_prompts_without_decoding",
        ),
        "video_cache_gib": ("what does not fit is decoded again", f"{DATA}test_as_many_videos_stay_in_memory_as_fit"),
        "cache_features": ("features stay in place of pixels", f"{KEPT}test_features_kept_of_a_whole_video_are_cut"),
    },
    ModelConfig: {
        "model": ("the weights of that checkpoint", f"{MODEL}test_the_model_asked_for_is_trained"),
        "tiny_family": ("its architecture", f"{MODEL}test_the_embedded_model_is_of_the_family_and_seed_asked_for"),
        "dtype": ("weights of policy, engine and reference", f"{MODEL}test_weights_are_of_the_dtype_asked_for"),
        "freeze_vision": ("no gradient for the tower", f"{MODEL}test_a_frozen_tower_has_no_gradient"),
        "lora_rank": ("rows of the adapters", ADAPTERS),
        "lora_alpha": ("their scale", ADAPTERS),
        "lora_targets": ("the layers that have them", ADAPTERS),
        "gradient_checkpointing": ("layers run again in the backward pass", RECOMPUTED),
        "checkpoint_every": ("every k-th of them", RECOMPUTED),
        "checkpoint_vision": ("the tower's blocks too", RECOMPUTED),
        "attention_core": (
            "the core of sampling, update and reference",
            f"{MODEL}test_sampling_update_and_reference_attend_by_the_core_asked_for",
        ),
        "liger_layers": ("whose norms run", f"{MODEL}test_fused_layers_run_where_they_are_asked_for"),
        "offline": (
            "the hub is not asked",
            "security/test_checkpoint_folders.py::test_the_hub_is_asked_for_nothing_that_a_folder_names",
        ),
        "trust_remote_code": ("every loader is told", f"{MODEL}test_remote_code_is_trusted_only_when_asked_for"),
        "allow_pickle": ("pickles load, or are refused", f"{MODEL}test_pickles_are_loaded_only_when_asked_for"),
    },
    RolloutConfig: {
        "num_generations": ("answers of a group, the off-policy one included", SAMPLER),
        "temperature": (
            "log-probs of sampler, policy and reference",
            f"{ROLLOUT}test_policy_sampler_and_reference_read_one_temperature",
        ),
        "top_p": ("what the sampler is asked", SAMPLER),
        "top_k": ("what the sampler is asked", SAMPLER),
        "max_completion_length": ("what the sampler is asked", SAMPLER),
        "rollout_backend": ("which of the two samples", VLLM),
        "vllm_memory": ("what vLLM is made with", VLLM),
        "max_logp_gap": (
            "a sampler that is further off ends the run",
            "run/test_guards.py::test_a_sampler_that_drifts_from_the_policy_is_seen_and_ends_the_run",
        ),
        "cuda_graphs": ("decoding is asked for graphs", f"{ROLLOUT}test_cuda_graphs_reach_the_decoding_passes"),
        "gather_weights": (
            "passes through whole weights, or through the engine",
            "rollout/test_backends.py::test_partitioned_parameters_are_gathered_once_or_in_every_pass",
        ),
        "record_rollouts": ("the file holds the sampled answers", REPLAY),
        "replay_rollouts": ("the answers are the file's, nothing is sampled", REPLAY),
    },
    AlgorithmConfig: {
        **dict.fromkeys(
            ("shaping", "tau", "alpha_1", "alpha_2", "lambda_off", "downscale", "format_weight"),
            ("advantages by the paper's formula", ADVANTAGES),
        ),
        **dict.fromkeys(
            (
                "beta",
                "epsilon_low",
                "epsilon_high",
                "delta",
                "loss_type",
                "importance_sampling_level",
                "off_policy_ratio",
                "off_policy_kl",
            ),
            ("the loss of the kernel with that number", LOSS),
        ),
        "scale_rewards": ("advantages that are not divided", ADVANTAGES),
        "dual_clip": ("the loss of the kernel with that number", LOSS),
        "prune_ratio": (
            "the answers of the update",
            "learning/test_pruning.py::test_an_update_is_of_the_rows_that_stay",
        ),
        "format_reward": (
            "where it is added, or a factor",
            f"{ALGORITHM}test_the_format_is_added_or_a_factor_as_asked",
        ),
        "soft_overlong": ("what long answers lose", f"{ALGORITHM}test_long_answers_lose_as_much_as_asked"),
        "mask_truncated_completions": (
            "the mask of the loss, and its normaliser",
            f"{ALGORITHM}test_cut_answers_leave_the_loss_only_where_asked",
        ),
        "rewards": ("which functions reward, and their weights", f"{ALGORITHM}test_answers_earn_what_is_asked_for"),
        "cot_off_policy": ("the off-policy text", f"{ALGORITHM}test_the_off_policy_text_of_think_prompts"),
        "updates_per_batch": ("optimizer steps", f"{ALGORITHM}test_a_batch_is_used_for_as_many_updates_as_asked_for"),
        "require_tags": (
            "rewards and scores of answers without tags",
            f"{ALGORITHM}test_answers_without_tags_are_worth_something_only_where_allowed",
        ),
        "loss_impl": (
            "what computes loss and log-probs",
            f"{ALGORITHM}test_the_implementation_asked_for_computes_loss_and_log_probs",
        ),
    },
    TrainConfig: {
        "phases": ("steps and their methods", f"{LAWS}test_every_optimizer_step_of_the_plan_comes_once"),
        "output_dir": ("the run's folder", f"{TRAIN}test_the_run_is_where_it_is_asked_to_be"),
        "resume": ("folder, checkpoint and first step", f"{TRAIN}test_a_resumed_run_is_the_one_asked_for"),
        "dry_run": ("the plan is printed, nothing made", f"{TRAIN}test_a_dry_run_prints_the_plan_and_makes_nothing"),
        "seed": ("the order of prompts; of answers, adapters and models too", f"{TRAIN}test_another_seed_asks_in"),
        "prompts_per_device": ("prompts of a row", ROWS),
        "sft_prompts_per_device": ("the same in supervised phases alone", ROWS),
        "queries_per_video": (
            "questions about a video in one row",
            "learning/test_tree_training.py::test_trees_train_as_rows_of_single_questions_do",
        ),
        "gradient_accumulation_steps": ("rows of a step", ROWS),
        "sequence_parallel_size": (
            "ranks that run a row together",
            "learning/test_ranks.py::test_ranks_that_share_rows_train_as_one_plain_rank",
        ),
        "max_tokens_per_row": ("tokens of a row", f"{TRAIN}test_rows_and_prefill_passes_keep_the_budget_asked_for"),
        "packing": ("a row's groups of one answer each", ROWS),
        "learning_rate": ("peak of the rates", RATE),
        "lr_schedule": ("their course", RATE),
        "warmup_ratio": ("their beginning", RATE),
        "weight_decay": ("how far weights shrink", f"{TRAIN}test_weights_decay_by_the_rate_and_the_decay_asked_for"),
        "adam_beta2": ("that of the optimizer", f"{TRAIN}test_the_optimizer_is_made_as_asked_for"),
        "max_grad_norm": ("how far a clipped step moves", f"{LAWS}test_clipping_bounds_the_gradient"),
        "zero_stage": ("that of the engine", STATE),
        "offload": ("where the engine keeps its state", STATE),
        "reduce_gradients": (
            "bytes that a step reduces",
            "learning/test_traffic.py::test_zero_2_sums_gradients_over_ranks_once_a_step_or_in_every_row",
        ),
        "deepspeed_config": ("what the engine makes of the file", STATE),
        "eval_modes": ("modes asked, in turn", f"{TRAIN}test_evaluations_are_in_the_modes_and_batches_asked_for"),
        "eval_batch_size": ("queries of a batch", f"{TRAIN}test_evaluations_are_in_the_modes_and_batches_asked_for"),
        "eval_steps": ("the steps that are evaluated", METRIC),
        "best_metric": ("the checkpoint that stays", METRIC),
        "show_completions": ("the steps whose answers are shown", KEPT_ANSWERS),
        "log_completions": ("the groups that keep their texts", KEPT_ANSWERS),
        "eval_start": ("the scores before the first step", f"{TRAIN}test_the_start_is_evaluated_unless_told_otherwise"),
        "save_minutes": (
            "the clock that saves",
            "planning/test_look_before.py::test_the_clock_asks_for_a_checkpoint_and_rank_0_decides",
        ),
        "save_steps": ("the steps that save", f"{TRAIN}test_as_many_checkpoints_stay_as_asked_for"),
        "keep_best": ("that of the best evaluation stays, or does not", BEST),
        "keep_checkpoints": ("the folders that stay", f"{TRAIN}test_as_many_checkpoints_stay_as_asked_for"),
        "max_skipped_steps": ("one more in a row ends the run", PATIENCE),
        "stall_timeout_s": ("the patience of the heartbeat", PATIENCE),
        "stop_grace_s": ("the patience after SIGTERM", PATIENCE),
        "local_rank": ("nothing: the process group knows the rank", f"{TRAIN}test_the_run_is_where_it_is_asked_to_be"),
    },
}
"""By section and field: the law, and the test that fails where the field is not read. A name may be its beginning."""


@cache
def names_in(file: Path) -> list[str]:
    return [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]


def test_every_section_has_its_plan() -> None:
    assert list(PLAN) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_a_row_and_every_row_a_setting_and_a_test(section: type) -> None:
    assert sorted(PLAN[section]) == sorted(field.name for field in fields(section))
    for name, (_, where) in PLAN[section].items():
        path, _, test = where.partition("::")
        found = [each for each in names_in(TESTS / path) if each.startswith(test)]
        assert len(found) == 1 and test.startswith("test_"), f"{name}: {where} is {found or 'not there'}"

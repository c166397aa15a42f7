"""What the plan counts, against the counts written out by hand."""

from __future__ import annotations

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import Config, DataConfig, ModelConfig
from tempsamp_fast.model.architectures import count_parameters, model_config
from tempsamp_fast.model.lora import add_adapters
from tempsamp_fast.planning.estimate import (
    Work,
    num_frames,
    step_flops,
    step_memory,
    text_and_video_tokens,
    update_flops,
)
from tests.conftest import Tiny

WORK = Work((4, 8, 8), 200, 30, 5, 4)


def config_of(*words: str) -> Config:
    return parse_args(["--phases", "tempsamp:1", "--dtype", "float32", *words])


@pytest.mark.parametrize(
    ("method", "words", "passes"),
    [
        ("sft", ("--beta", "0.04", "--updates_per_batch", "2"), 3),
        ("tempsamp", ("--beta", "0"), 3),
        ("tempsamp", ("--beta", "0.04"), 4),
        ("grpo", ("--beta", "0", "--updates_per_batch", "2"), 7),
        ("tempsamp", ("--beta", "0.04", "--updates_per_batch", "3"), 11),
    ],
)
def test_an_update_is_so_many_forward_passes(tiny: Tiny, method: str, words: tuple[str, ...], passes: int) -> None:
    """A backward pass counts as two; one for the reference, one for old log-probs where there are several updates."""
    model = tiny.model().config
    found = update_flops(WORK, model, config_of(*words).algorithm, method, num_prompts=2)
    assert found == pytest.approx(2 * passes * WORK.forward_flops(5, model))


@pytest.mark.parametrize(("recomputes", "passes"), [("false", 7), ("true", 9)])
def test_a_step_samples_and_recomputes_too(tiny: Tiny, recomputes: str, passes: int) -> None:
    """Of three prompts with four sampled answers of five, and two updates; what is sampled is not recomputed."""
    model = tiny.model().config
    config = config_of("--gradient_checkpointing", recomputes, "--beta", "0", "--updates_per_batch", "2")
    found = step_flops(WORK, model, config, "tempsamp", num_prompts=3)
    assert found == pytest.approx(3 * (WORK.forward_flops(4, model) + passes * WORK.forward_flops(5, model)))


def test_bytes_of_a_plain_float32_run(tiny: Tiny) -> None:
    """AdamW keeps two moments; a reference is a second model."""
    model, config = tiny.model().config, config_of("--zero_stage", "0", "--beta", "0.04")
    parameters = count_parameters(model, config.model)
    memory = step_memory(WORK, model, parameters, config, 4, 1)
    assert memory.weights == memory.reference == memory.gradients == 4 * parameters.total
    assert memory.optimizer == 8 * parameters.total


@pytest.mark.parametrize(
    ("words", "gradients", "optimizer", "off_gpu"),
    [
        (("0",), 6, 3, 0),
        (("1",), 2, 3, 0),
        (("2", "--reduce_gradients", "row"), 0.5, 3, 0),
        (("2", "--reduce_gradients", "step"), 2, 3, 0),
        (("3",), 0.5, 3, 0),
        (("1", "--offload", "optimizer"), 2, 0, 3),
        (("2", "--reduce_gradients", "row", "--offload", "optimizer"), 0, 0, 3.5),
        (("2", "--reduce_gradients", "step", "--offload", "optimizer"), 2, 0, 3),
    ],
)
def test_bytes_of_a_trained_parameter_on_four_devices(
    tiny: Tiny, words: tuple[str, ...], gradients: float, optimizer: float, off_gpu: float
) -> None:
    """In bfloat16, with weights and two moments in float32 shared out; stage 0 has gradients in float32 too."""
    model, config = tiny.model().config, config_of("--zero_stage", *words)
    parameters = count_parameters(model, config.model)
    memory = step_memory(WORK, model, parameters, config, 2, 4)
    found = [memory.gradients, memory.optimizer, memory.off_gpu]
    assert found == pytest.approx([each * parameters.total for each in (gradients, optimizer, off_gpu)])


@pytest.mark.parametrize(("stage", "num_bytes"), [("0", 4), ("1", 8), ("2", 8)])
def test_the_optimizers_step_holds_float32_gradients_and_two_flat_copies(stage: str, num_bytes: int) -> None:
    """On one device, where a short prompt leaves little else to hold: of a trained parameter in bfloat16."""
    config = config_of("--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--zero_stage", stage)
    shape = model_config(config.model)
    parameters = count_parameters(shape, config.model)
    memory = step_memory(Work((1, 2, 2), 117, 1, 1, 0), shape, parameters, config, 2, 1)
    assert memory.activations == num_bytes * parameters.total


def test_sampling_keeps_keys_and_values_of_every_token(tiny: Tiny) -> None:
    model = tiny.model().config
    many, few = (Work((4, 8, 8), length, 30, 5, 4) for length in (10**7, 10**6))
    steps = ("--gradient_accumulation_steps", "300")  # so many prompts that keys are more than what an update keeps
    config = config_of("--prompts_per_device", "1", *steps, "--max_tokens_per_row", "1")
    parameters = count_parameters(model, config.model)
    bytes_of = lambda work: step_memory(work, model, parameters, config, 4, 1).activations
    text = model.text_config
    layers = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    attending = sum(kind == "full_attention" for kind in layers)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_token = 2 * 4 * attending * text.num_key_value_heads * head_dim
    assert bytes_of(many) - bytes_of(few) == pytest.approx(300 * per_token * 9 * 10**6)


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_more_recomputed_layers_keep_less(tiny: Tiny) -> None:
    model = tiny.model().config
    settings = [(), ("--checkpoint_every", "3"), ("--checkpoint_every", "1")]
    recomputing = lambda words: ("--gradient_checkpointing", *words) if words else ("--gradient_checkpointing", "False")
    kept = []
    for words in settings:
        config = config_of(*recomputing(words))
        parameters = count_parameters(model, config.model)
        kept.append(step_memory(WORK, model, parameters, config, 4, 1).activations)
    assert kept[0] > kept[1] > kept[2]


@pytest.mark.parametrize(
    ("duration_s", "fps", "frames"), [(10.3, 2.0, 20), (10.3, 3.0, 30), (10.3, 0.7, 6), (1.0, 2.0, 4), (999.0, 2.0, 64)]
)
def test_frames_of_a_video_are_even_and_within_their_bounds(duration_s: float, fps: float, frames: int) -> None:
    assert num_frames(duration_s, DataConfig(fps=fps, min_frames=4, max_frames=64)) == frames


@pytest.mark.parametrize(
    ("model", "tokens"), [("Qwen2.5-VL-3B-Instruct", 100 + 3 * 6), ("Qwen3-VL-2B-Instruct", 100 + 3 * (6 + 10))]
)
def test_since_qwen3_vl_every_temporal_patch_has_text_of_its_own(model: str, tokens: int) -> None:
    assert text_and_video_tokens((3, 4, 6), model_config(ModelConfig(model=f"Qwen/{model}")), 100) == tokens


@pytest.mark.parametrize(
    "settings", [{}, {"freeze_vision": True}, {"lora_rank": 4}, {"lora_rank": 2, "lora_targets": "q_proj, up_proj"}]
)
def test_as_much_is_trained_as_the_optimizer_gets(tiny: Tiny, settings: dict) -> None:
    model, config = tiny.model(), ModelConfig(**settings)
    if config.lora_rank:
        pytest.importorskip("peft")
        model = add_adapters(model, config, seed=0)
    elif config.freeze_vision:
        model.model.visual.requires_grad_(False)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(tiny.model().config, config).trained(config) == trained

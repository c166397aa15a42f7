"""What the plan counts, against the counts written out by hand."""

from __future__ import annotations

import pytest

from tempsamp_fast.arguments import parse_args
from tempsamp_fast.config import Config
from tempsamp_fast.model.architectures import count_parameters
from tempsamp_fast.planning.estimate import Work, step_memory, update_flops
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


def test_bytes_of_a_plain_float32_run(tiny: Tiny) -> None:
    """AdamW keeps two moments; a reference is a second model."""
    model, config = tiny.model().config, config_of("--zero_stage", "0", "--beta", "0.04")
    parameters = count_parameters(model, config.model)
    memory = step_memory(WORK, model, parameters, config, 4, 1)
    assert memory.weights == memory.reference == memory.gradients == 4 * parameters.total
    assert memory.optimizer == 8 * parameters.total


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

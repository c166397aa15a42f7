"""What packed rows do not support is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from tempsamp_fast.model.families import FAMILIES, UNSUPPORTED
from tempsamp_fast.model.loading import check_architecture
from tempsamp_fast.model.packing import pack
from tempsamp_fast.model.policy import Policy


def test_another_model_class_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Linear.*Qwen2_5_VLForConditionalGeneration, Qwen3VL"):
        Policy(nn.Linear(1, 1))


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_sliding_windows_are_refused_by_name(tiny) -> None:
    with pytest.raises(ValueError, match="use_sliding_window"):
        Policy(tiny.model(use_sliding_window=True, sliding_window=4, max_window_layers=0))


@pytest.mark.parametrize("tiny", ["qwen2_5_vl"], indirect=True)
def test_other_layer_types_are_refused_by_name(tiny) -> None:
    model = tiny.model()
    model.config.text_config.layer_types = ["linear_attention"] * 3
    with pytest.raises(ValueError, match="linear_attention"):
        Policy(model)


def test_attention_dropout_is_refused_by_name(tiny) -> None:
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        Policy(tiny.model(attention_dropout=0.1))


def test_a_model_wrapped_by_peft_is_supported(tiny) -> None:
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "v_proj"])
    policy = Policy(peft.get_peft_model(tiny.model(), adapter))
    assert policy.config.model_type == tiny.family


def test_saved_configurations_do_not_name_the_attention(tiny, tmp_path) -> None:
    Policy(tiny.model()).base_model.save_pretrained(tmp_path)
    assert "tempsamp" not in (tmp_path / "config.json").read_text()


def test_adapters_on_the_head_are_refused(tiny) -> None:
    """The loss would read the weight below them."""
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapters on the head are not supported"):
        Policy(peft.get_peft_model(tiny.model(), adapter))


@pytest.mark.parametrize("name", [*UNSUPPORTED, "llava", "of_tomorrow"])
def test_other_types_are_refused_by_name_with_what_is_in_their_way(tmp_path: Path, name: str) -> None:
    """Whether transformers knows them or not, and whatever else their configuration says."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "text_config": 1}))
    with pytest.raises(ValueError, match=f"model_type='{name}' is not supported.*{', '.join(FAMILIES)}") as refused:
        check_architecture(str(tmp_path))
    assert UNSUPPORTED.get(name, "") in str(refused.value)


@pytest.mark.parametrize("tiny", ["qwen3_vl_moe", "qwen3_5_moe"], indirect=True)
def test_the_auxiliary_loss_of_experts_is_refused(tiny) -> None:
    with pytest.raises(ValueError, match="output_router_logits=True is not supported"):
        Policy(tiny.model(output_router_logits=True))


@pytest.mark.parametrize("tiny", ["qwen3_vl_moe", "qwen3_5_moe"], indirect=True)
def test_a_router_sees_each_token_of_a_prompt_once(tiny) -> None:
    policy, seen = Policy(tiny.model()), []
    (row,) = pack(tiny.groups(), config=policy.config, max_tokens_per_row=10_000)
    for layer in policy.base_model.model.language_model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[0]))
    policy(row)
    assert seen == [row.num_tokens] * 3

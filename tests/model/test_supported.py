"""What packed rows do not support is refused by name."""

from __future__ import annotations

import pytest
from torch import nn

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

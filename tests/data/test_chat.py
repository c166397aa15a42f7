"""From samples to token ids and back, for every model family; the embedded models and their tokenizer."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from tempsamp_fast.batch import VideoPatches
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.data.prompts import off_policy_text, question
from tempsamp_fast.embedded.model import tiny_model, train_tokenizer
from tempsamp_fast.model.families import FAMILIES
from tempsamp_fast.model.mrope import mrope_positions
from tempsamp_fast.rewards import parse_span
from tempsamp_fast.sample import Sample

SAMPLE = Sample("clip/0", Path("clip.mp4"), "A red square appears.", 30.0, ((12.54, 17.83),))
VIDEO = VideoPatches(torch.empty(0), (3, 4, 6), 1.0, torch.tensor([0.25, 1.25, 10.75], dtype=torch.float64))


@cache
def tokenizer() -> Any:
    return train_tokenizer([question(SAMPLE.query, "think"), off_policy_text(SAMPLE, "think") or ""] * 2)


@cache
def model(family: str) -> PreTrainedModel:
    return tiny_model(tokenizer(), family, seed=0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def chat(family: str) -> Chat:
    return Chat(tokenizer(), model(family).config)


def test_a_placeholder_stands_for_every_merged_patch(chat: Chat, family: str) -> None:
    ids = chat.prompt(SAMPLE, "answer", "grounding", VIDEO).input_ids
    config = model(family).config
    assert int((ids == config.video_token_id).sum()) == 3 * 4 * 6 // 4
    num_starts = int((ids == config.vision_start_token_id).sum())
    assert num_starts == (1 if family == "qwen2_5_vl" else 3)


def test_the_prompt_reads_as_the_chat_template_and_ends_where_the_answer_begins(chat: Chat, family: str) -> None:
    text = tokenizer().decode(chat.prompt(SAMPLE, "answer", "grounding", VIDEO).input_ids)
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert question(SAMPLE.query, "answer") in text
    frame = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    if family == "qwen2_5_vl":
        assert "<|vision_start|>" + "<|video_pad|>" * 18 + "<|vision_end|>" in text
    else:
        assert f"<0.2 seconds>{frame}<1.2 seconds>{frame}<10.8 seconds>{frame}" in text


def test_think_prompts_ask_for_reasoning(chat: Chat) -> None:
    answer, think = (chat.prompt(SAMPLE, mode, "grounding", VIDEO).input_ids for mode in ("answer", "think"))
    assert "<think>" not in tokenizer().decode(answer)
    assert "<think>" in tokenizer().decode(think)


def test_positions_can_be_made_for_the_prompt(chat: Chat, family: str) -> None:
    ids = chat.prompt(SAMPLE, "answer", "grounding", VIDEO).input_ids
    positions, start = mrope_positions(ids, [VIDEO.grid_thw], [VIDEO.second_per_grid], model(family).config)
    assert positions.shape == (3, len(ids))
    assert start == int(positions.max()) + 1


@pytest.mark.parametrize("mode", ["answer", "think"])
def test_an_off_policy_answer_ends_with_eos_and_has_no_other_special_token(chat: Chat, mode) -> None:
    text = off_policy_text(SAMPLE, mode)
    assert text is not None
    completion = chat.off_policy_completion(text)
    assert completion.is_off_policy
    assert completion.ids[-1] == tokenizer().eos_token_id
    assert not set(completion.ids[:-1].tolist()) & set(tokenizer().added_tokens_decoder)
    assert tokenizer().decode(completion.ids[:-1]) == text
    assert parse_span(chat.completion(completion.ids).text) == (12.54, 17.83)


def test_a_sampled_answer_reads_without_special_tokens(chat: Chat) -> None:
    ids = chat.encode("<answer> 1.00 to 2.00 </answer><|im_end|>")
    assert chat.completion(ids).text == "<answer> 1.00 to 2.00 </answer>"


def test_a_special_token_within_an_answer_is_not_read(chat: Chat) -> None:
    """As another engine's sampler may say one."""
    ids = chat.encode("<answer> 1.00 <|vision_end|>to 2.00 </answer><|im_end|>")
    assert chat.completion(ids).text == "<answer> 1.00 to 2.00 </answer>"


def test_an_unexpanded_prompt_has_one_placeholder_between_markers_that_an_engine_does_not_write(
    chat: Chat, family: str
) -> None:
    text = tokenizer().decode(chat.unexpanded(SAMPLE, "answer", "grounding"))
    markers = ("<|vision_start|>", "<|vision_end|>") if family == "qwen2_5_vl" else ("", "")
    assert text.count("<|video_pad|>") == 1 and f"user\n{markers[0]}<|video_pad|>{markers[1]}" in text
    assert text.count("<|vision_start|>") == text.count("<|vision_end|>") == (family == "qwen2_5_vl")


def test_every_special_token_but_eos_is_banned(chat: Chat, family: str) -> None:
    config = model(family).config
    assert {config.video_token_id, config.image_token_id, config.vision_start_token_id} <= set(chat.banned_token_ids)
    assert chat.eos_token_id not in chat.banned_token_ids


def test_an_added_token_that_is_not_special_can_be_said(family: str) -> None:
    """As `<think>` is in the tokenizers of Qwen3."""
    thinking = deepcopy(tokenizer())
    thinking.add_tokens(["<think>"])
    assert thinking.convert_tokens_to_ids("<think>") not in Chat(thinking, model(family).config).banned_token_ids


def test_every_digit_is_a_token_of_its_own() -> None:
    tokens = [tokenizer().decode([token]) for token in tokenizer()("from 12.54 to 1783").input_ids]
    assert [token for token in tokens if re.search(r"\d", token)] == list("12541783")


def test_the_models_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    kinds = {
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
        "qwen3_5": "Qwen3_5ForConditionalGeneration",
        "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    }
    assert type(model(family)).__name__ == kinds[family] and type(model(family)).__module__.startswith("transformers.")
    num_parameters = sum(parameter.numel() for parameter in model(family).parameters())
    assert 0.5e6 < num_parameters < 10e6
    model(family).config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = lambda seed: next(tiny_model(tokenizer(), "qwen2_5_vl", seed).parameters())
    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(ValueError, match=r"'llava'.*qwen2_5_vl, qwen3_vl"):
        tiny_model(tokenizer(), "llava", seed=0)


def test_a_template_without_a_place_for_the_video_is_named(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.tokenizer, "chat_template", "{{ messages[0].content[1].text }}")
    with pytest.raises(ValueError, match="chat template"):
        chat.prompt(SAMPLE, "answer", "grounding", VIDEO)


def test_ids_that_no_token_has_are_banned(family: str) -> None:
    """Checkpoints round the vocabulary up."""
    config, size = deepcopy(model(family).config), len(tokenizer())
    config.text_config.vocab_size = size + 3
    assert {size, size + 1, size + 2} <= set(Chat(tokenizer(), config).banned_token_ids)
    assert max(Chat(tokenizer(), config).banned_token_ids) == size + 2

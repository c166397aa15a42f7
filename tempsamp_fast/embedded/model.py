"""The embedded model: a real Qwen-VL architecture of about a million random weights, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Tokenizer, set_seed

from tempsamp_fast.model.families import family_named
from tempsamp_fast.system.files import os_errors_of_safetensors

BASE = Path(__file__).parent / "base"
"""A checkpoint of it that looks at videos, made by `tempsamp_fast/demo/pretrain.py`."""
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = ["<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]

CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerBase:
    """Byte-level BPE with Qwen's pre-tokenizer (every digit its own token) and special tokens, learned from `texts`."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS) - 1)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS, "eos_token": "<|im_end|>"})
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerBase, family: str, seed: int) -> PreTrainedModel:
    """A randomly initialised model of the given family whose vocabulary is the tokenizer's.

    Raises ValueError for an unknown family.
    """
    set_seed(seed)
    config = tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids, family)
    build: Any = family_named(family).model_class
    return build(config)


def tiny_config(vocab_size: int, token_id: Callable[[str], Any], family: str) -> Any:
    """Its shape. Raises ValueError for an unknown family."""
    text: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "initializer_range": 0.05,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id(END_OF_TEXT),
    }
    ids: dict[str, Any] = {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "tie_word_embeddings": True,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "initializer_range": 0.05,
    }
    record = family_named(family)
    return record.config_class(
        text_config=text | record.tiny["text_config"], vision_config=vision | record.tiny["vision_config"], **ids
    )


def build_tiny_checkpoint(folder: Path, texts: Iterable[str], family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Write a tiny checkpoint (model and tokenizer) as an ordinary Hugging Face folder and return the folder."""
    tokenizer = train_tokenizer(texts)
    model = tiny_model(tokenizer, family, seed).float()
    with os_errors_of_safetensors():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

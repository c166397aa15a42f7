"""Loading a video language model and its tokenizer, from a checkpoint or built from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.lora import base_checkpoint, load_adapters

PREPROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_model(checkpoint: str, config: ModelConfig, dtype: torch.dtype) -> tuple[Any, Chat]:
    """A model and its chat format from a Hugging Face folder or hub name; a `PeftModel` from a folder of adapters.

    Weights are read from safetensors alone, unless `allow_pickle`.
    Raises ValueError for a folder without a model, an architecture that is not supported, and weights that are
    missing or cannot be read.
    """
    base = base_checkpoint(checkpoint)
    weights = base or checkpoint
    check_architecture(weights, config.trust_remote_code)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            weights,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.allow_pickle else True,
            output_loading_info=True,
        )
        model, loading = loaded
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model={checkpoint!r}: cannot be loaded: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=config.trust_remote_code)
        asked: Any = [{"role": "user", "content": [{"type": "video"}]}]
        tokenizer.apply_chat_template(asked, tokenize=False)
    except Exception as error:  # what a damaged file raises is plain Exception in tokenizers, and jinja2's own
        raise ValueError(f"model={checkpoint!r}: its tokenizer or chat template cannot be used: {error}") from error
    if loading["missing_keys"]:
        raise ValueError(f"model={weights!r}: has no weights for {', '.join(sorted(loading['missing_keys']))}")
    apply_liger_layers(model, config.liger_layers)
    if base:
        model = load_adapters(model, checkpoint, config.allow_pickle)
    return model, Chat(tokenizer, model.config, _preprocessor_files(checkpoint))


def _preprocessor_files(checkpoint: str) -> dict[str, str]:
    """Read at once: the checkpoint that a run was resumed from is deleted when newer ones are kept."""
    found = {
        name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in PREPROCESSOR_FILES
    }
    return {name: Path(file).read_text() for name, file in found.items() if file is not None}


def check_architecture(checkpoint: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError, naming the checkpoint and the supported families, unless it can be trained here."""
    folder = Path(checkpoint)
    looks_local = folder.is_absolute() or checkpoint.startswith(".") or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise ValueError(f"model={checkpoint!r}: no config.json in this folder")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={checkpoint!r}: cannot be read as a checkpoint: {error}") from error
    try:
        family_of(config)
    except ValueError as error:
        raise ValueError(f"model={checkpoint!r}: {error}") from None

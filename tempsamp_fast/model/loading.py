"""Loading a video language model and its tokenizer, from a checkpoint or built from scratch."""

from __future__ import annotations

import logging
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from tempsamp_fast.config import ModelConfig
from tempsamp_fast.data.chat import Chat
from tempsamp_fast.model.families import family_of
from tempsamp_fast.model.liger_layers import apply_liger_layers
from tempsamp_fast.model.lora import ADAPTER_CONFIG, base_checkpoint, load_adapters

logger = logging.getLogger(__name__)
HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
HUB_TIMEOUT_S = 4.0
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
    checkpoint = found_checkpoint(checkpoint)
    base = base_checkpoint(checkpoint)
    weights = found_checkpoint(base) if base else checkpoint
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
    eos = getattr(model.generation_config, "eos_token_id", None)
    apply_liger_layers(model, config.liger_layers)
    if base:
        model = load_adapters(model, checkpoint, config.allow_pickle)
    return model, Chat(tokenizer, model.config, _preprocessor_files(checkpoint), eos)


def _preprocessor_files(checkpoint: str) -> dict[str, str]:
    """Read at once: the checkpoint that a run was resumed from is deleted when newer ones are kept."""
    found = {
        name: cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in PREPROCESSOR_FILES
    }
    return {name: Path(file).read_text() for name, file in found.items() if file is not None}


def found_checkpoint(name: str) -> str:
    """A folder, or a hub name that can be asked for now; where the hub cannot be reached, the copy in its cache.

    Raises ValueError for a path that is no folder with a config.json, and within `HUB_TIMEOUT_S` for a hub name that is
    neither to be reached nor cached.
    """
    folder = Path(name).expanduser()
    beside = folder.parent != Path() and (folder.parent.exists() or folder.parent == Path("runs"))
    is_path = beside or not re.fullmatch(HUB_NAME, name)
    if folder.exists() or is_path:
        if not folder.is_dir():
            raise ValueError(f"model={name!r}: no such folder")
        if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
            raise ValueError(f"model={name!r}: no config.json in this folder")
        return str(folder)
    unreachable = _why_unreachable(name)
    if not unreachable:
        return name
    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        logger.warning("model=%r: %s; taking the copy in %s", name, unreachable, Path(cached).parent)
        return str(Path(cached).parent)
    raise ValueError(f"model={name!r}: no such folder, nor a copy in the hub's cache, and {unreachable}")


def _why_unreachable(name: str) -> str:
    """Empty where the hub answers at once, whatever it says. Names are looked up without a time limit: in a thread."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = f"{huggingface_hub.constants.ENDPOINT}/api/models/{name}"
    reasons = [f"{huggingface_hub.constants.ENDPOINT} did not answer within {HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=HUB_TIMEOUT_S).close()
            reasons.append("")
        except urllib.error.HTTPError as error:
            reasons.append("" if error.code < 500 else f"{huggingface_hub.constants.ENDPOINT} cannot be used: {error}")
        except (OSError, ValueError) as error:
            reasons.append(f"{huggingface_hub.constants.ENDPOINT} cannot be reached: {error}")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return reasons[-1]


def check_architecture(checkpoint: str, trust_remote_code: bool = False) -> None:
    """Raise ValueError, naming the checkpoint and the supported families, unless it can be trained here."""
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"model={checkpoint!r}: cannot be read as a checkpoint: {error}") from error
    try:
        family_of(config)
    except ValueError as error:
        raise ValueError(f"model={checkpoint!r}: {error}") from None
